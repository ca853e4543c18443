"""The link between the projections of an FFN: what the nonlinearity between them receives.

It follows from the derivatives of one projection's input with respect to the outputs of others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nerve.measuring.ffns import Site, declared_widths, rows_along
from nerve.measuring.recorded import decides

N_ELEMENTS = 32
"""Number of elements of the input whose derivatives show which features they depend on."""

Kind = Literal["plain", "gated", "unclear"]

_SUM = (
    "if the nonlinearity gets a sum of them (an adapter?), pre is that sum, and not the output of "
    'either: nerve.Site(activation, "input")'
)
"""What to do if pre is not the output of a module."""


@dataclass(frozen=True)
class Link:
    """The finding that the input of one projection depends on the output of one or two others, and
    how.

    Attributes:
        pre: the input of the nonlinearity; if `kind` is unclear, a candidate.
        post: the projection after it.
        other: the factor that multiplies the nonlinearity's output if gated.
        kind: `plain`, `gated`, or unclear.
        why: the reason why it is unclear.
    """

    pre: Site
    post: nn.Module
    other: Site | None
    kind: Kind
    why: str = ""

    @property
    def modules(self) -> list[nn.Module]:
        """Its projections: of pre, of the other factor if gated, and of post."""
        other = [] if self.other is None else [self.other.module]
        return [self.pre.module, *other, self.post]

    @property
    def key(self) -> tuple[Any, ...]:
        """What distinguishes links: modules and parts."""
        part = self.pre.part
        return (self.pre.module, part.start, part.stop, part.step, self.post)


@dataclass
class Leaf:
    """The output of a projection as an autograd leaf."""

    module: nn.Module
    tensor: Tensor

    @property
    def rows(self) -> Tensor:
        """`[samples, features]`."""
        return rows_of(self.tensor, self.module)


def link_of(
    post: nn.Module, h: Tensor, leaves: list[Leaf], is_gate: Callable[[nn.Module], bool]
) -> Link | None:
    """How the input of a projection depends on the outputs of others; None if it is not the output
    of a nonlinearity.

    Args:
        post: the projection.
        h: its input, `[samples, features]`, with a graph to the leaves.
        leaves: the outputs of the projections that have run.
        is_gate: whether a projection's name says so.
    """
    chosen = _chosen(h.detach())
    given = _gradients(h[chosen].sum(), leaves)
    reaching = [
        (leaf, gradient != 0)
        for leaf, gradient in zip(leaves, given, strict=True)
        if gradient is not None and bool((gradient != 0).any())
    ]
    sources = [leaf for leaf, _ in reaching]
    if not sources or any(len(leaf.rows) != len(h) for leaf in sources):
        return None
    reached = [rows_of(hit, leaf.module) for leaf, hit in reaching]
    width = h.shape[1]
    if len(sources) > 2:
        return _several(post, h, sources, reached, chosen)
    if len(sources) == 1 and sources[0].rows.shape[1] == 2 * width:
        return _fused(post, h, sources[0], reached[0], chosen, is_gate)
    if any(leaf.rows.shape[1] != width for leaf in sources):
        return None
    if not all(_only_at(hit, chosen, [0]) for hit in reached):
        return _mixed(post, sources, reached, chosen)
    sites = [Site(leaf.module, "output") for leaf in sources]
    slopes = _gradients(h.sum(), sources)
    d = [rows_of(slope, leaf.module) for slope, leaf in zip(slopes, sources, strict=True)]
    x = [leaf.rows.detach() for leaf in sources]
    if len(sources) == 1:
        varies = not torch.allclose(d[0], d[0][:1].expand_as(d[0]), rtol=1e-6, atol=0)
        return Link(sites[0], post, None, "plain") if varies else None
    return _gated(post, h, sources, sites, x, d, is_gate)


def _several(
    post: nn.Module, h: Tensor, sources: list[Leaf], reached: list[Tensor], chosen: Any
) -> Link | None:
    """Features that depend elementwise on more than two projections, and not linearly on all of
    them, as if an adapter is added to a gated FFN."""
    if any(leaf.rows.shape[1] != h.shape[1] for leaf in sources):
        return None
    if not all(_only_at(hit, chosen, [0]) for hit in reached):
        return None
    slopes = _gradients(h.sum(), sources)
    if all(torch.allclose(slope, slope.flatten()[0]) for slope in slopes):
        return None  # a residual stream
    why = f"it depends on {len(sources)} projections: {_SUM}"
    return Link(Site(sources[0].module, "output"), post, None, "unclear", why)


def _fused(
    post: nn.Module,
    h: Tensor,
    source: Leaf,
    reached: Tensor,
    chosen: Any,
    is_gate: Callable[[nn.Module], bool],
) -> Link | None:
    """The link for one projection that computes both factors of a gated FFN."""
    width = h.shape[1]
    layouts = {
        "halves": ([0, width], (slice(0, width), slice(width, 2 * width)), 1),
        "turns": ([0, 1], (slice(0, None, 2), slice(1, None, 2)), 2),
    }
    for offsets, parts, stride in layouts.values():
        if not _only_at(reached, (chosen[0], chosen[1] * stride), offsets):
            continue
        (slope,) = _gradients(h.sum(), [source])
        slopes, values = rows_of(slope, source.module), source.rows.detach()
        sites = [Site(source.module, "output", part) for part in parts]
        x, d = [values[:, part] for part in parts], [slopes[:, part] for part in parts]
        return _gated(post, h, [source, source], sites, x, d, is_gate)
    return None


def _gated(
    post: nn.Module,
    features: Tensor,
    sources: list[Leaf],
    sites: list[Site],
    x: list[Tensor],
    d: list[Tensor],
    is_gate: Callable[[nn.Module], bool],
) -> Link:
    """Determines which of two factors goes through the nonlinearity: h is not linear in it.

    Euler: what is linear (and homogeneous) in x equals x dh/dx. If that holds for both factors
    (ReLU is homogeneous, too), h / (x0 x1) depends only on the sign of the gate. If it holds
    for neither, as in `(x1 + 1) act(x0)`, the gate is the factor along which h curves.
    """
    h = features.detach()
    off = [float((x[i] * d[i] - h).abs().sum() / h.abs().sum()) for i in (0, 1)]
    if not min(off) <= (1e-3 if h.dtype.itemsize > 2 else 5e-2):
        curves = [_curves(features, sources[i], sites[i].part) for i in (0, 1)]
        if curves[0] != curves[1]:
            gate = curves.index(True)
            return Link(sites[gate], post, sites[1 - gate], "gated")
        why = "it is linear in neither side"
        if torch.equal(d[0], d[1]):
            why = f"it depends on two projections alike: {_SUM}"
        return Link(sites[0], post, sites[1], "unclear", why)
    if max(off) > 2 * torch.finfo(h.dtype).eps and max(off) > 4 * min(off):
        gate = off.index(max(off))
    else:
        are_gates = [decides(x[i], x[0] * x[1], h) for i in (0, 1)]
        if are_gates[0] == are_gates[1]:
            are_gates = [is_gate(site.module) for site in sites]
        if are_gates[0] == are_gates[1]:
            return Link(sites[0], post, sites[1], "unclear", "it is linear in both sides")
        gate = are_gates.index(True)
    return Link(sites[gate], post, sites[1 - gate], "gated")


def _curves(h: Tensor, leaf: Leaf, part: slice) -> bool:
    """Whether the slope of h along a part of a leaf depends on that part."""
    (slope,) = torch.autograd.grad(h.sum(), leaf.tensor, create_graph=True)
    if slope.grad_fn is None:
        return False
    rows = rows_of(slope, leaf.module)[:, part]
    (second,) = torch.autograd.grad(rows.sum(), leaf.tensor, retain_graph=True, allow_unused=True)
    return second is not None and bool((rows_of(second, leaf.module)[:, part] != 0).any())


def _mixed(post: nn.Module, sources: list[Leaf], reached: list[Tensor], chosen: Any) -> Link | None:
    """Features that depend on one projection's output in the same sample, but not elementwise."""
    rows = torch.zeros(len(reached[0]), dtype=torch.bool, device=reached[0].device)
    rows[chosen[0]] = True
    if any(bool(hit[~rows].any()) for hit in reached):
        return None
    why = "features are mixed in between, for example by a normalization"
    return Link(Site(sources[0].module, "output"), post, None, "unclear", why)


def rows_of(tensor: Tensor, module: nn.Module) -> Tensor:
    """`[samples, features]` of the input or output of a projection."""
    widths = declared_widths(module)
    return rows_along(tensor, -1 if widths is None else widths.axis)


def _chosen(h: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of some large elements, each from a different row, spread over all of
    them."""
    rows = torch.linspace(0, len(h) - 1, min(N_ELEMENTS, len(h))).long().unique().to(h.device)
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(len(rows), h.shape[1], generator=generator).to(h.device)
    return rows, (h[rows].float().abs() * (weight + 0.05)).argmax(1)


def _gradients(of: Tensor, leaves: list[Leaf]) -> tuple[Any, ...]:
    tensors = [leaf.tensor for leaf in leaves]
    return torch.autograd.grad(of, tensors, retain_graph=True, allow_unused=True)


def _only_at(reached: Tensor, chosen: tuple[Tensor, Tensor], offsets: list[int]) -> bool:
    """Whether derivatives are nonzero at the chosen elements, shifted by the offsets, and nowhere
    else."""
    rows, columns = chosen
    if int(columns.max()) + max(offsets) >= reached.shape[1]:
        return False
    expected = torch.zeros_like(reached)
    for offset in offsets:
        expected[rows, columns + offset] = True
    hit = [bool(reached[rows, columns + offset].any()) for offset in offsets]
    return all(hit) and not bool((reached & ~expected).any())
