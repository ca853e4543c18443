"""Nonlinearities that are seen between two projections, but not which features they receive."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nerve.measuring.ffns import Site, declared_widths
from nerve.measuring.link import Leaf, Link
from nerve.measuring.recorded import values_kept

_N_ELEMENTS = 8
_RECENT = 6
"""Number of the last outputs of projections that are examined."""
_LEAST = 2
"""Number of elements that must depend elementwise on one output: what shares the input of the
projection, such as the heads of attention, has others."""


def may_be_unusual(post: nn.Module, h: Tensor, leaves: Sequence[Leaf]) -> bool:
    """Whether a projection leads to fewer features, and another one before it has wide enough ones,
    of the same samples.

    Args:
        post: the projection.
        h: its input, `[samples, features]`.
        leaves: the outputs of the projections that have run.
    """
    widths = declared_widths(post)
    if widths is None or widths.d_in <= widths.d_out:
        return False
    return any(_fits(leaf, h, widths.d_out) for leaf in leaves[-_RECENT:])


def unusual_link(post: nn.Module, h: Tensor, leaves: Sequence[Leaf]) -> Link | None:
    """The link, unclear, if some elements of a projection's input are a nonlinear function of one
    or two elements of the output of another one, in the same sample; None otherwise. The arguments
    are those of `may_be_unusual`."""
    widths = declared_widths(post)
    if widths is None or widths.d_in <= widths.d_out:
        return None
    recent = [leaf for leaf in leaves[-_RECENT:] if _fits(leaf, h, widths.d_out)]
    live = (h.detach().isfinite().all(1) & (h.detach() != 0).any(1)).nonzero()[:, 0]
    if not recent or len(live) < _LEAST:
        return None
    chosen = live[torch.linspace(0, len(live) - 1, _N_ELEMENTS, device=h.device).long()]
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(chosen), h.shape[1], generator=generator).to(h)
    columns = ((h[chosen] != 0) * (weights + 0.05)).argmax(1)
    slopes: dict[nn.Module, list[Tensor]] = {}
    for row, column in zip(chosen.tolist(), columns.tolist(), strict=True):
        found = _elementwise(h[row, column], recent, row)
        if found is not None:
            slopes.setdefault(found[0], []).append(found[1])
    is_cut = bool((h.detach() == 0).any())  # as by a ReLU, which is linear elsewhere
    for module, values in slopes.items():
        is_constant = all(len(each) == 1 and torch.allclose(each, values[0][:1]) for each in values)
        if len(values) >= _LEAST and (is_cut or not is_constant):
            why = (
                "only some features are one, or they lie in another order or are added to others; "
                'give both sites with their parts, or nerve.Site(activation, "input")'
            )
            return Link(Site(module, "output"), post, None, "unclear", why)
    return None


def _fits(leaf: Leaf, h: Tensor, d_out: int) -> bool:
    return len(leaf.rows) == len(h) and leaf.rows.shape[1] > d_out


def _elementwise(
    element: Tensor, recent: Sequence[Leaf], row: int
) -> tuple[nn.Module, Tensor] | None:
    """The projection on whose output, in one sample and one or two features, an element depends,
    and the slopes there."""
    with values_kept([leaf.given for leaf in recent]):
        tensors = [leaf.tensor for leaf in recent]
        given = torch.autograd.grad(element, tensors, retain_graph=True, allow_unused=True)
        found = [
            (leaf.module, leaf.like_rows(slope))
            for leaf, slope in zip(recent, given, strict=True)
            if slope is not None and bool((slope != 0).any())
        ]
    if len(found) != 1:
        return None
    module, slope = found[0]
    hit = slope.nonzero()
    is_own = bool((hit[:, 0] == row).all()) and len(hit) <= 2
    return (module, slope[slope != 0]) if is_own else None
