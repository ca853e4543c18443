"""Finds the FFNs of any torch model: by what follows from what, not by what it is called."""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from nerve.errors import MeasurementError
from nerve.measuring.dependence import Dependence, Link
from nerve.measuring.ffns import FFN, FFNAdapter, sites_of
from nerve.measuring.forward import call, evaluating
from nerve.measuring.places import Place, Tree
from nerve.measuring.sites import declared_widths, is_pointwise, n_inputs

_FEW = 2
_SHORT = 16
"""How many sequences, and positions of each, the forward pass gets that looks for FFNs."""


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
        links, n_runs = _links(model, batch, forward or call)
        found, unclear = _described(Tree(model), links, n_runs, select)
    if not found:
        raise _none_found(model, select, unclear)
    _check_layers(found, layers)
    found = [ffn for ffn in found if layers is None or ffn.layer in layers]
    return FoundFFNs(sorted(found, key=lambda ffn: ffn.layer), paths, unclear)


def projections_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that multiply by a matrix: one that wraps another of the same widths,
    as adapters do, and no network that says how wide it is."""
    found: dict[nn.Module, None] = {}

    def walk(module: nn.Module) -> None:
        if _is_projection(module):
            found[module] = None
            return
        for child in module.children():
            walk(child)

    walk(model)
    return list(found)


def _is_projection(module: nn.Module) -> bool:
    widths = declared_widths(module)
    if widths is None or (isinstance(module, nn.modules.conv._ConvNd) and not is_pointwise(module)):
        return False
    inner = [declared_widths(each) for each in module.modules() if each is not module]
    return not any(inner) or widths in inner


# One forward pass


def _links(
    model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], object]
) -> tuple[list[Link], dict[tuple[Any, ...], int]]:
    """What follows from what, and how often in a forward pass."""
    paths = {module: path for path, module in model.named_modules()}
    seen = Dependence(projections_of(model), lambda module: "gate" in paths[module])
    with evaluating(model):
        if batch is not None:
            _watch_few(seen, partial(forward, model), batch)
        elif not any(_works(seen, model, example) for example in _examples(model)):
            _watch_blocks(seen, model)
    return list(seen.links.values()), dict(seen.n_links)


def _watch_few(seen: Dependence, run: Callable[[Any], object], batch: Any) -> None:
    """Runs on few and short sequences where the model can, or else on the whole batch."""
    for part in (_cut(batch, _FEW, _SHORT), _cut(batch, _FEW, None)):
        try:
            seen.watch(partial(run, part))
        except Exception:
            seen.forget()
            continue
        if seen.links:
            return
        seen.forget()
    seen.watch(partial(run, batch))


def _cut(batch: Any, n_sequences: int, n_positions: int | None) -> Any:
    """The first sequences of every tensor that has as many as the first one, and of tokens (whole
    numbers, `[batch, sequence]`) and their masks the first positions."""
    tensors = [each for each in _leaves(batch) if each.ndim]
    n = len(tensors[0]) if tensors else 0

    def cut(each: Any) -> Any:
        if isinstance(each, Mapping):
            return {key: cut(value) for key, value in each.items()}
        if isinstance(each, tuple | list) and type(each) in (tuple, list):
            return type(each)(cut(value) for value in each)
        if not isinstance(each, Tensor) or not each.ndim or len(each) != n:
            return each
        each = each[:n_sequences]
        short = each.ndim == 2 and not each.is_floating_point()
        return each[:, :n_positions] if short else each

    return cut(batch)


def _leaves(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _leaves(value)


def _examples(model: nn.Module) -> Iterator[Any]:
    """Batches that the model itself gives as examples."""
    for name in ("dummy_inputs", "example_input_array"):
        example = getattr(model, name, None)
        if example is not None:
            device = next(model.parameters()).device
            yield _moved(example, device)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return batch


def _works(seen: Dependence, model: nn.Module, batch: Any) -> bool:
    try:
        seen.watch(partial(call, model, batch))
    except Exception:
        seen.forget()
    return bool(seen.links)


# Without a batch: blocks by themselves


def _watch_blocks(seen: Dependence, model: nn.Module) -> None:
    """Runs the smallest modules that hold two projections which fit, each on random features."""
    projections = set(projections_of(model))
    done: set[nn.Module] = set()
    for module in _inner_first(model):
        if module in projections:
            continue
        inside = [each for each in module.modules() if each in projections and each not in done]
        for first, x in _inputs(inside):
            if first in done:
                continue
            try:
                seen.watch(partial(module, x))
            except Exception:
                continue
            for link in seen.links.values():
                done |= {link.pre.module, link.post}
                done |= set() if link.other is None else {link.other.module}


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _inner_first(child)
    yield module


def _inputs(inside: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Random features for each pair of projections that fits."""
    for first in inside:
        a = declared_widths(first)
        fits = any(
            (b := declared_widths(each)) is not None
            and each is not first
            and a is not None
            and a.d_out in (b.d_in, 2 * b.d_in)
            and a.d_in == b.d_out
            for each in inside
        )
        weight = next((p for p in first.parameters() if p.is_floating_point()), None)
        if a is not None and fits and weight is not None:
            sizes = [2, 8] if a.axis == -1 else [2] + [4] * (-1 - a.axis)
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(*sizes, a.d_in, generator=generator).to(weight)
            yield first, x if a.axis == -1 else x.movedim(-1, 1)


# Descriptions


def _described(
    tree: Tree, links: Sequence[Link], n_runs: Mapping[tuple[Any, ...], int], select: str | None
) -> tuple[list[FFN], list[str]]:
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
            n_runs=1 if n_runs[link.key] == 1 else None,
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
