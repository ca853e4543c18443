"""Finds the FFNs of any torch model from the dependence between its tensors, not from names."""

import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from nerve.errors import MeasurementError, NotFiniteError
from nerve.measuring.experts import Experts, grouped
from nerve.measuring.ffns import FFN, FFNAdapter, declared_widths
from nerve.measuring.forward import call
from nerve.measuring.found import FoundFFNs
from nerve.measuring.given import require_model
from nerve.measuring.link import Link
from nerve.measuring.places import Place, Tree
from nerve.measuring.slices import stacked
from nerve.measuring.streams import tensors_of
from nerve.measuring.trial import Seen, look_at

_SHOWN = 6


def find_ffns(
    model: nn.Module,
    batch: Any = None,
    *,
    layers: Collection[int] | None = None,
    select: str | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> FoundFFNs:
    """Finds the FFNs of a model and returns them ordered by layer.

    The networks of nerve-run name their FFNs themselves. In any other model, an FFN is a pair of
    projections (linear layers, with the adapters around them; Conv1D of transformers; 1 × 1
    convolutions) where the input of the second is an elementwise nonlinear function of the output
    of the first, or, if gated, of the product of two projections or of the two halves of one. This
    is determined from derivatives in a forward pass of a few sequences, and in a second one with
    random features where the first does not show it, as for a dead FFN; names only break ties. What
    may be an FFN but is unclear is numbered with the others; describe it with `nerve.FFNAdapter`.
    Unless `select` is given, only FFNs with as many outputs as inputs are returned; if there is
    none, as in a two-layer classifier, this restriction does not apply.

    Args:
        model: the model.
        batch: the batch that `forward` takes. None uses the model's `dummy_inputs` or
            `example_input_array`; without these, the blocks are run separately: n_runs is then a
            guess, and layers are numbered in the order in which they are listed.
        layers: the layers to return; None for all.
        select: a glob such as `"*.mlp"`, matched against the path of the module that contains both
            projections, or of the first projection.
        forward: runs the model on one batch; by default `model(batch)`, or `model(**batch)` for a
            mapping.

    Raises:
        ConfigError: if `model` is not a module, or its weights have no sizes yet.
        MeasurementError: if no FFN is found, or none in one of `layers`.
        NotFiniteError: if features are NaN in every sample, as in a model that has diverged.
    """
    require_model(model)
    paths: Mapping[nn.Module, str] = {module: path for path, module in model.named_modules()}
    own = [module for module in model.modules() if isinstance(module, FFN)]
    found: list[FFN]
    unclear: list[str] = []
    account = ""
    if own:
        found = [m for m in own if select is None or fnmatch.fnmatch(paths[m], select)]
    else:
        seen = look_at(model, batch, forward or call)
        found, paths, unclear = _described(model, seen, select)
        account = "" if select else _account(paths, seen)
    if not found:
        raise _none_found(model, batch, select, paths, unclear, account)
    _check_layers(found, layers)
    found = [ffn for ffn in found if layers is None or ffn.layer in layers]
    return FoundFFNs(sorted(found, key=lambda ffn: ffn.layer), paths, unclear)


def _described(
    model: nn.Module, seen: Seen, select: str | None
) -> tuple[list[FFN], Mapping[nn.Module, str], list[str]]:
    """FFNs that were identified, the paths of modules, and a line of code for each unclear
    candidate. Raises `NotFiniteError` as `find_ffns` does."""
    slices = [s for each in seen.products for stack in each.stacks.values() for s in stack.slices]
    tree, dependence = Tree(model, slices), seen.dependence
    if dependence.not_finite:
        raise _not_finite(tree.paths[next(iter(dependence.not_finite))])
    links = grouped(tree, seen, dependence.links.values())
    chosen = [each for each in links if _is_chosen(tree, each, select)]
    sure = [each for each in chosen if _one(each).kind != "unclear"]
    through = [each for each in sure if _returns(_one(each))]
    sure = sure if select is not None or not through else through
    taken = {module for each in sure for module in each.modules}
    maybe = [each for each in chosen if _may_be(_one(each)) and _one(each).post not in taken]
    numbered = [each for each in chosen if each in sure or each in maybe]
    is_sure = [each in sure for each in numbered]
    names = ["experts" if isinstance(each, Experts) else None for each in numbered]
    places = tree.places([each.modules for each in numbered], names, is_sure)
    found: list[FFN] = []
    unclear: list[str] = []
    for each, place in zip(numbered, places, strict=True):
        if each in maybe:
            unclear.append(_by_hand(tree, each, place))
            continue
        if isinstance(each, Experts):
            found += each.ffns(place)
            continue
        pre = each.pre.module if each.pre.part == slice(None) else each.pre
        n_runs = 1 if dependence.n_links[each.key] == 1 else None
        gated = each.kind == "gated"
        found.append(FFNAdapter(place.layer, place.name, pre, each.post, n_runs, gated))
    if select is None:
        unclear += _unseen(tree, seen, taken)
        unclear += _hidden(tree, [each for each in dependence.hidden if each not in taken])
    return found, tree.paths, unclear


def _one(each: Link | Experts) -> Link:
    return each.links[0] if isinstance(each, Experts) else each


def _unseen(tree: Tree, seen: Seen, taken: Collection[nn.Module]) -> list[str]:
    """Stacked parameters that may belong to experts and are not part of an FFN that was found."""
    lines = []
    for products in seen.products:
        known = {
            name
            for name, stack in products.stacks.items()
            if any(each in taken for each in stack.slices)
        }
        other = [
            f"{name} {tuple(parameter.shape)}"
            for name, parameter in stacked(products.holder)
            if name not in known and min(parameter.shape[-2:]) > 1
        ]
        if other:
            lines.append(
                f"# model.{tree.paths[products.holder]}: {', '.join(other)} are stacks of "
                "matrices; if they belong to experts, no FFN of these was found"
            )
    return lines


def _hidden(tree: Tree, modules: Sequence[nn.Module]) -> list[str]:
    """One line for modules that ran where autograd does not record dependence."""
    if not modules:
        return []
    more = f" and {len(modules) - 1} more" if modules[1:] else ""
    return [
        f"# model.{tree.paths[modules[0]]}{more}: autograd does not record how their inputs are "
        "computed (activation checkpointing or no_grad?); turn these off for find_ffns, or "
        "describe their FFNs by hand"
    ]


def _is_chosen(tree: Tree, link: Link | Experts, select: str | None) -> bool:
    paths = (tree.holder(link.modules), tree.paths[_one(link).pre.module])
    return select is None or any(fnmatch.fnmatch(path, select) for path in paths)


def _returns(link: Link) -> bool:
    post = declared_widths(link.post)
    pre = declared_widths(link.pre.module)
    return pre is not None and post is not None and pre.d_in == post.d_out


def _may_be(link: Link) -> bool:
    """Whether an unclear candidate has the shape of an FFN."""
    post = declared_widths(link.post)
    return link.kind == "unclear" and _returns(link) and post is not None and post.d_in > post.d_out


def _by_hand(tree: Tree, each: Link | Experts, place: Place) -> str:
    link = _one(each)
    if isinstance(each, Experts):
        return f"# the experts in model.{tree.holder(each.modules)}: {link.why}"
    pre, post = (f"model.{tree.paths[module]}" for module in (link.pre.module, link.post))
    return f'nerve.FFNAdapter({place.layer}, "{place.name}", {pre}, {post})  # {link.why}'


def _account(paths: Mapping[nn.Module, str], seen: Seen) -> str:
    """Which projections ran, and between which of them no nonlinearity was seen."""
    dependence = seen.dependence
    if not dependence.ran:
        return f"None of its {len(dependence.projections)} projections ran."
    at = partial(_path_of, paths)
    linear = [
        f"between {' or '.join(map(at, modules))} and {at(post)}"
        for post, modules in dependence.linear.items()
    ]
    ran = _listed([*map(at, dependence.ran)])
    none = f" No nonlinearity was seen {_listed(linear)}." if linear else ""
    return f"{len(dependence.ran)} projections ran: {ran}.{none}"


def _path_of(paths: Mapping[nn.Module, str], module: nn.Module) -> str:
    return f"model.{paths[module]}" if paths[module] else "the model"


def _listed(texts: Sequence[str]) -> str:
    more = f", and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _none_found(
    model: nn.Module,
    batch: Any,
    select: str | None,
    paths: Mapping[nn.Module, str],
    unclear: Sequence[str],
    account: str,
) -> MeasurementError:
    if select is not None and not any(fnmatch.fnmatch(path, select) for path in paths.values()):
        some = ", ".join(_some(paths.values(), select)) or "none"
        return MeasurementError(
            f"select= is a glob of module paths; no module of {type(model).__name__} matches "
            f"{select!r}. Some of its paths: {some}."
        )
    chosen = "" if select is None else f" that matches select={select!r}"
    fix = "Describe"
    if batch is None:
        fix = "Give a batch, nerve.find_ffns(model, batch), or describe"
    elif _is_one_sample(batch):
        fix = "A single sample shows none: put a batch with more first, or describe"
    maybe = ("Perhaps: " + "; ".join(unclear[:4])) if unclear else account
    return MeasurementError(
        "A model to measure needs FFNs: two projections with a nonlinearity in between. No FFN"
        f"{chosen} was found in a forward pass of {type(model).__name__}. {fix} each with "
        f'nerve.FFNAdapter(layer, "ffn", block.up, block.down). {maybe}'.strip()
    )


def _not_finite(path: str) -> NotFiniteError:
    return NotFiniteError(
        "FFNs are found from derivatives, so features must be finite; those of "
        f"model.{path} are not, in any sample: the model has diverged, or the batch is not finite. "
        "Describe the FFNs by hand with nerve.FFNAdapter: the status of their rows is then "
        "non_finite."
    )


def _is_one_sample(batch: Any) -> bool:
    """Whether a batch is one token, or one vector."""
    return all(
        (each[..., 0] if each.is_floating_point() else each).numel() == 1
        for each in tensors_of(batch)
        if each.ndim
    )


def _some(paths: Iterable[str], select: str) -> list[str]:
    """A few paths: the closest matches of a glob, or else the first ones, each standing for its
    siblings."""
    given = {re.sub(r"\b\d+\b", "*", path) for path in paths if path}
    near = get_close_matches(select, sorted(given), n=_SHOWN, cutoff=0.4)
    return list(dict.fromkeys([*near, *sorted(given, key=lambda path: path.count("."))]))[:_SHOWN]


def _check_layers(found: Sequence[FFN], layers: Collection[int] | None) -> None:
    known = sorted({ffn.layer for ffn in found})
    unknown = sorted(set(layers or ()) - set(known))
    if unknown or (layers is not None and not layers):
        raise MeasurementError(
            f"Layers to measure must be among those with FFNs, {', '.join(map(str, known))}; got "
            f"{', '.join(map(str, unknown)) or 'none'}."
        )
