"""Lines on what may belong to FFNs in a model, but was not seen to."""

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from nerve.measuring.ffns import declared_widths
from nerve.measuring.places import Tree
from nerve.measuring.slices import Slice, stacked
from nerve.measuring.trial import Seen


def unseen(tree: Tree, seen: Seen, taken: Collection[nn.Module]) -> list[str]:
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


def functional(tree: Tree, seen: Seen) -> list[str]:
    """Matrices that may be those of an FFN and that their module multiplies itself, without calling
    a projection: parameters, or projections that did not run."""
    lines = []
    inside = {part for each in seen.dependence.projections for part in each.modules()}
    for module in tree.paths:
        if module in inside or isinstance(module, nn.RNNBase | Slice):
            continue
        idle = {
            f"{name}.weight": (widths.d_out, widths.d_in)
            for name, child in module.named_children()
            if child in seen.dependence.projections and child not in seen.dependence.ran
            if (widths := declared_widths(child)) is not None
        }
        own = {
            name: tuple(each.shape)
            for name, each in module.named_parameters(recurse=False)
            if each.ndim == 2 and min(each.shape) > 1
        }
        sizes = idle | own
        if _are_of_ffn(list(sizes.values())):
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            lines.append(
                f"# {path_of(tree.paths, module)}: {told} are multiplied without a module that "
                "runs, if at all; if they belong to an FFN, call a linear layer for each"
            )
    return lines


def _are_of_ffn(sizes: Sequence[tuple[int, ...]]) -> bool:
    """Whether two matrices lead to other features and back, or three are stacked alike."""
    is_pair = any(a != b and (b, a) in sizes for a, b in sizes)
    return is_pair or any(a > b and sizes.count((a, b)) > 2 for a, b in sizes)


def hidden(tree: Tree, modules: Sequence[nn.Module]) -> list[str]:
    """One line for modules that ran where autograd does not record dependence."""
    if not modules:
        return []
    more = f" and {len(modules) - 1} more" if modules[1:] else ""
    return [
        f"# model.{tree.paths[modules[0]]}{more}: autograd does not record how their inputs are "
        "computed (activation checkpointing or no_grad?); turn these off for find_ffns, or "
        "describe their FFNs by hand"
    ]


def path_of(paths: Mapping[nn.Module, str], module: nn.Module) -> str:
    return f"model.{paths[module]}" if paths[module] else "the model"
