"""Finds the FFNs of any torch model: by what follows from what, not by what it is called."""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from torch import nn

from nerve.errors import MeasurementError
from nerve.measuring.dependence import Dependence, Link
from nerve.measuring.ffns import FFN, FFNAdapter, sites_of
from nerve.measuring.forward import call
from nerve.measuring.places import Place, Tree
from nerve.measuring.sites import declared_widths, n_inputs
from nerve.measuring.trial import look_at


class FoundFFNs(list[FFN]):
    """The FFNs of a model; printed, they are a table.

    Attributes:
        unclear: lines that describe by hand what might be an FFN, each with what speaks against it.
    """

    def __init__(self, ffns: Iterable[FFN], paths: Mapping[nn.Module, str], unclear: Sequence[str]):
        super().__init__(ffns)
        self._paths = paths
        self.unclear = list(unclear)

    def table(self) -> pd.DataFrame:
        """One row an FFN: layer, name, pre, post, d_in, d_ff, gated, n_runs."""
        return pd.DataFrame([self._row(ffn) for ffn in self])

    def __repr__(self) -> str:
        lines = [self.table().to_string(index=False)]
        if self.unclear:
            lines += ["Not measured; by hand, if it is an FFN:", *self.unclear]
        return "\n".join(lines)

    def _row(self, ffn: FFN) -> dict[str, Any]:
        pre, post = sites_of(ffn)
        return {
            "layer": ffn.layer,
            "name": ffn.name,
            "pre": self._paths.get(pre.module, "?") + _part(pre.part),
            "post": self._paths.get(post.module, "?"),
            "d_in": n_inputs(pre),
            "d_ff": post.width,
            "gated": getattr(ffn, "gated", None),
            "n_runs": getattr(ffn, "n_runs", 1),
        }


def find_ffns(
    model: nn.Module,
    batch: Any = None,
    *,
    layers: Collection[int] | None = None,
    select: str | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> FoundFFNs:
    """The FFNs of a model, by layer.

    Where modules fulfil `nerve.measuring.ffns.FFN`, it is they. Of any other model it is the pairs
    of projections (linear layers, Conv1D of transformers, 1 × 1 convolutions) of which the second
    gets what follows from the first element by element, and not linearly; or from the product of
    two, or of both halves of one, where gated. That is seen in one forward pass of a few sequences,
    by derivatives; names break ties alone. Unless `select` says more, an FFN gives as many
    features as it gets; where none does, as in a classifier of two layers, that does not matter.

    Args:
        model: the model.
        batch: what `forward` takes. None for the `dummy_inputs` or the `example_input_array` of a
            model that has them, or else for running the blocks by themselves: n_runs is then a
            guess, and layers are numbered as they are listed.
        layers: the layers to take; None for all.
        select: a glob such as `"*.mlp"`; takes the FFNs of which it is the path: of the module that
            holds both projections, or of the first of them.
        forward: runs the model on one batch; by default `model(batch)`, or `model(**batch)` for a
            mapping.

    Raises:
        MeasurementError: if there is none, or if one of `layers` has none.
    """
    paths = {module: path for path, module in model.named_modules()}
    own = [module for module in model.modules() if isinstance(module, FFN)]
    found: list[FFN]
    unclear: list[str] = []
    if own:
        found = [m for m in own if select is None or fnmatch.fnmatch(paths[m], select)]
    else:
        seen = look_at(model, batch, forward or call)
        found, unclear = _described(Tree(model), seen, select)
    if not found:
        raise _none_found(model, select, unclear)
    _check_layers(found, layers)
    found = [ffn for ffn in found if layers is None or ffn.layer in layers]
    return FoundFFNs(sorted(found, key=lambda ffn: ffn.layer), paths, unclear)


def _described(tree: Tree, seen: Dependence, select: str | None) -> tuple[list[FFN], list[str]]:
    """What is sure, as FFNs, and what is not, as lines to describe it by hand."""
    links = list(seen.links.values())
    sure = [link for link in links if link.kind != "unclear" and _is_chosen(tree, link, select)]
    through = [link for link in sure if _returns(link)]
    sure = sure if select is not None or not through else through
    places = tree.places([_modules(link) for link in sure])
    found: list[FFN] = [
        FFNAdapter(
            place.layer,
            place.name,
            link.pre.module if link.pre.part == slice(None) else link.pre,
            link.post,
            n_runs=1 if seen.n_links[link.key] == 1 else None,
            gated=link.kind == "gated",
        )
        for link, place in zip(sure, places, strict=True)
    ]
    taken = {link.post for link in sure}
    unclear = [
        _by_hand(tree, link, place)
        for link, place in zip(links, tree.places([_modules(each) for each in links]), strict=True)
        if link.kind == "unclear" and link.post not in taken and _returns(link) and _widens(link)
    ]
    return found, unclear


def _modules(link: Link) -> list[nn.Module]:
    other = [] if link.other is None else [link.other.module]
    return [link.pre.module, *other, link.post]


def _is_chosen(tree: Tree, link: Link, select: str | None) -> bool:
    paths = (tree.holder(_modules(link)), tree.paths[link.pre.module])
    return select is None or any(fnmatch.fnmatch(path, select) for path in paths)


def _returns(link: Link) -> bool:
    post = declared_widths(link.post)
    pre = declared_widths(link.pre.module)
    return pre is not None and post is not None and pre.d_in == post.d_out


def _widens(link: Link) -> bool:
    post = declared_widths(link.post)
    return post is not None and post.d_in > post.d_out


def _by_hand(tree: Tree, link: Link, place: Place) -> str:
    pre, post = (f"model.{tree.paths[module]}" for module in (link.pre.module, link.post))
    return f'nerve.FFNAdapter({place.layer}, "{place.name}", {pre}, {post})  # {link.why}'


def _part(part: slice) -> str:
    if part == slice(None):
        return ""
    step = "" if part.step is None else f":{part.step}"
    return f"[{part.start or 0}:{'' if part.stop is None else part.stop}{step}]"


def _none_found(model: nn.Module, select: str | None, unclear: Sequence[str]) -> MeasurementError:
    chosen = "" if select is None else f" that select={select!r} takes"
    maybe = ("Perhaps: " + "; ".join(unclear[:4])) if unclear else ""
    return MeasurementError(
        "A model to measure needs FFNs: two projections with a nonlinearity in between. "
        f"{type(model).__name__} has none{chosen} that a forward pass has shown. Give a batch, "
        "nerve.find_ffns(model, batch), or describe each with "
        f'nerve.FFNAdapter(layer, "ffn", block.up, block.down). {maybe}'.strip()
    )


def _check_layers(found: Sequence[FFN], layers: Collection[int] | None) -> None:
    known = sorted({ffn.layer for ffn in found})
    unknown = sorted(set(layers or ()) - set(known))
    if unknown or (layers is not None and not layers):
        raise MeasurementError(
            f"Layers to measure must have FFNs, as {', '.join(map(str, known))} have; got "
            f"{', '.join(map(str, unknown)) or 'none'}."
        )
