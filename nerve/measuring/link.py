"""The link between the projections of an FFN: what the nonlinearity between them receives.

It follows from the derivatives of one projection's input with respect to the outputs of others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nerve.measuring.ffns import Site, declared_widths, rows_along
from nerve.measuring.recorded import decides, is_scaled, values_kept

N_ELEMENTS = 32
"""Number of elements of the input whose derivatives show which features they depend on."""

_RECENT = 6
"""Number of the last outputs of projections among which those of an FFN are."""

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


class Finding(NamedTuple):
    """What the derivatives of one input have shown.

    Attributes:
        link: None if the input is not the output of a nonlinearity.
        doubted: projections from which the input is computed, if these samples do not show how: it
            does not change with the output of one of them, as that of a dead FFN, or changes
            linearly.
    """

    link: Link | None = None
    doubted: Sequence[nn.Module] = ()


@dataclass
class Leaf:
    """The output of a projection as an autograd leaf.

    Attributes:
        module: the projection.
        tensor: the leaf.
        given: the copy of it with which the model continues.
        node: the operation that made the copy; None where autograd does not record.
    """

    module: nn.Module
    tensor: Tensor
    given: Tensor
    node: torch.autograd.graph.Node | None

    @property
    def rows(self) -> Tensor:
        """`[samples, features]`."""
        return self.like_rows(self.tensor)

    def like_rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the same axes, as `rows`."""
        return rows_of(tensor, self.module)


def link_of(
    post: nn.Module, h: Tensor, leaves: list[Leaf], is_gate: Callable[[nn.Module], bool]
) -> Finding:
    """How the input of a projection depends on the outputs of others.

    Args:
        post: the projection.
        h: its input, `[samples, features]`, with a graph to the leaves.
        leaves: the outputs of the projections that have run.
        is_gate: whether a projection's name says so.
    """
    width = h.shape[1]
    live = h.detach().isfinite().all(1) & (h.detach() != 0).any(1)
    chosen = _chosen(h.detach(), live if bool(live.any()) else torch.ones_like(live))
    given = _gradients(h[chosen].sum(), leaves)
    connected = [
        (leaf, gradient != 0)
        for leaf, gradient in zip(leaves, given, strict=True)
        if gradient is not None
    ]
    reaching = [(leaf, hit) for leaf, hit in connected if bool(hit.any())]
    sources = [leaf for leaf, _ in reaching]
    fitting = [
        leaf
        for leaf, _ in connected
        if len(leaf.rows) == len(h) and leaf.rows.shape[1] in (width, 2 * width)
    ]
    finite = h.detach().isfinite().all(1)
    for leaf in sources:
        if len(leaf.rows) != len(h):
            return Finding()
        finite &= leaf.rows.detach().isfinite().all(1)
    whole = [leaf.module for leaf in fitting]
    if not sources or not bool((live & finite).any()):
        return Finding(doubted=whole)
    reached = [rows_of(hit, leaf.module) for leaf, hit in reaching]
    doubted = whole if any(leaf not in sources for leaf in fitting) else []
    if len(sources) > 2:
        return Finding(_several(post, h, sources, reached, chosen), doubted)
    if len(sources) == 1 and sources[0].rows.shape[1] == 2 * width:
        fused = _fused(post, h, finite, sources[0], reached[0], chosen, is_gate)
        if fused is not None:
            fused = _unscaled(fused, h, sources)
        return Finding(fused, whole if fused is None else doubted)
    if any(leaf.rows.shape[1] != width for leaf in sources):
        return Finding(doubted=doubted)
    if not all(_only_at(hit, chosen, [0]) for hit in reached):
        return Finding(_mixed(post, sources, reached, chosen), doubted)
    sites = [Site(leaf.module, "output") for leaf in sources]
    slopes = _gradients(h.sum(), sources)
    d = [rows_of(slope, leaf.module)[finite] for slope, leaf in zip(slopes, sources, strict=True)]
    x = [leaf.rows.detach()[finite] for leaf in sources]
    if len(sources) == 1:
        if any(
            torch.allclose(d[0], c.expand_as(d[0]), rtol=1e-6, atol=0)
            for c in (d[0][:1], d[0][:, :1])
        ):
            return Finding(doubted=whole)  # linear, also with a factor for each sample (a mask)
        return Finding(_unscaled(Link(sites[0], post, None, "plain"), h, sources), doubted)
    gated = _gated(post, h, finite, sources, sites, x, d, is_gate)
    return Finding(_unscaled(gated, h, sources), doubted)


def _unscaled(link: Link, h: Tensor, sources: list[Leaf]) -> Link:
    """The link, unclear if what the nonlinearity receives is pre scaled feature by feature."""
    leaf = next(each for each in sources if each.module is link.pre.module)
    if link.kind == "unclear" or leaf.node is None:
        return link
    if not is_scaled(h, leaf.node, link.pre.feature_axis):
        return link
    why = (
        "its output is scaled feature by feature before the nonlinearity, whose input is pre: "
        'nerve.Site(activation, "input")'
    )
    return replace(link, kind="unclear", why=why)


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
    finite: Tensor,
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
        slopes, values = rows_of(slope, source.module)[finite], source.rows.detach()[finite]
        sites = [Site(source.module, "output", part) for part in parts]
        x, d = [values[:, part] for part in parts], [slopes[:, part] for part in parts]
        return _gated(post, h, finite, [source, source], sites, x, d, is_gate)
    return None


def _gated(
    post: nn.Module,
    features: Tensor,
    finite: Tensor,
    sources: list[Leaf],
    sites: list[Site],
    x: list[Tensor],
    d: list[Tensor],
    is_gate: Callable[[nn.Module], bool],
) -> Link:
    """Determines which of two factors goes through the nonlinearity: h is not linear in it.

    Euler: what is linear (and homogeneous) in x equals x dh/dx. If that holds for both factors
    (ReLU is homogeneous, too), h / (x0 x1) depends only on the sign of the gate. If it holds
    for neither, as in `(x1 + 1) act(x0)`, the gate is the factor along which h curves. Only finite
    samples count; `x` and `d` have no others.
    """
    h = features.detach()[finite]
    off = [float((x[i] * d[i] - h).abs().sum() / h.abs().sum()) for i in (0, 1)]
    if not min(off) <= (1e-3 if h.dtype.itemsize > 2 else 5e-2):
        curves = [_curves(features, finite, sources[i], sites[i].part) for i in (0, 1)]
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


def _curves(h: Tensor, finite: Tensor, leaf: Leaf, part: slice) -> bool:
    """Whether the slope of h along a part of a leaf depends on that part, in finite samples."""
    with values_kept([leaf.given]):
        (slope,) = torch.autograd.grad(h.sum(), leaf.tensor, create_graph=True)
        if slope.grad_fn is None:
            return False
        rows = rows_of(slope, leaf.module)[finite][:, part]
        of = rows.sum()
        (second,) = torch.autograd.grad(of, leaf.tensor, retain_graph=True, allow_unused=True)
    if second is None:
        return False
    return bool((rows_of(second, leaf.module)[finite][:, part] != 0).any())


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


def _chosen(h: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of some large elements, each from a different live row, spread over all of
    them."""
    rows = live.nonzero()[:, 0]
    some = torch.linspace(0, len(rows) - 1, min(N_ELEMENTS, len(rows))).long().unique()
    rows = rows[some.to(h.device)]
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(len(rows), h.shape[1], generator=generator).to(h.device)
    return rows, (h[rows].float().abs() * (weight + 0.05)).argmax(1)


def _gradients(of: Tensor, leaves: list[Leaf]) -> list[Any]:
    """The derivatives along the leaves; None where there is no graph. In samples that are NaN they
    are 0."""
    tensors = [leaf.tensor for leaf in leaves]
    with values_kept([leaf.given for leaf in leaves[-_RECENT:]]):
        given = torch.autograd.grad(of, tensors, retain_graph=True, allow_unused=True)
        # Copies, since they may be what is overwritten.
        return [
            None if each is None else each.detach().masked_fill(each.isnan(), 0) for each in given
        ]


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
