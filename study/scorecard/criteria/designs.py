"""The designs that claims 1 to 10 compare, their required scales, and the runs that count."""

from evidence import Sweep

from criteria.check import Scale
from criteria.measured import Design

PRELN = {"normalization.kind": "layernorm", "normalization.placement": "pre"}
NORM_FREE = {"normalization.kind": "none"}
GELU, RELU, LEAKY = ({"activation.name": name} for name in ("gelu", "relu", "learnable_leaky_relu"))
PLAIN = {"ffn.gated": False, "ffn.constraint": "none", "ffn.width": 4}
ACTIVATIONS: dict[str, Design] = {
    "PreLN GELU": PRELN | GELU | PLAIN,
    "PreLN ReLU": PRELN | RELU | PLAIN,
}
NORMS: dict[str, Design] = {
    "PreLN GELU": PRELN | GELU | PLAIN,
    "norm-free GELU": NORM_FREE | GELU | PLAIN,
    "norm-free ReLU": NORM_FREE | RELU | PLAIN,
    "norm-free leaky": NORM_FREE | LEAKY | PLAIN,
}
CONSTRAINTS: dict[str, Design] = {
    name: NORM_FREE | {"ffn.constraint": name}
    for name in ("spectral_norm", "weight_norm", "hyperspherical")
}
PLACEMENTS: dict[str, Design] = {
    f"{name} {width}": {"normalization.placement": place, "ffn.width": width}
    for name, place in (("PreLN", "pre"), ("MixLN", "mix"), ("PostLN", "post"))
    for width in (1, 2, 4, 8)
}
POSITIONS: dict[str, Design] = {
    name: {"position.name": name} for name in ("rope", "learned", "none", "alibi")
}

THOUSANDS = Scale(12, 768, 3_000, 190e6)
LONG = Scale(12, 768, 10_000, 320e6)


def widths(design: Design) -> dict[str, Design]:
    """A design at widths 1 to 8, each with its own name."""
    return {f"width {width}": {**design, "ffn.width": width} for width in range(1, 9)}


def largest(sweep: Sweep) -> Sweep:
    """The runs with the largest d_model, because sizes are never pooled."""
    sizes = sweep.runs["model.d_model"]
    return sweep.where(sizes == sizes.max())


def most_complete_rate(sweep: Sweep) -> Sweep:
    """All runs with norms, and the norm-free ones at the learning rate where most of these can be
    compared (of several such rates, the highest)."""
    compared = sweep.compared
    rates = compared["optimizer.lr"][compared["normalization.kind"] == "none"].mode()
    has_norms = sweep.runs["normalization.kind"] != "none"
    return sweep.where(has_norms | (sweep.runs["optimizer.lr"] == rates.max()))


def all_placements_trained(sweep: Sweep) -> Sweep:
    """The runs at the rate and warm-up with the most PostLN runs that can be compared."""
    names = ["optimizer.lr", "optimizer.schedule.warmup"]
    post = sweep.compared[sweep.compared["normalization.placement"] == "post"]
    if post.empty:
        return sweep
    best = post.groupby(names).size().idxmax()
    return sweep.where((sweep.runs[names] == list(best)).all(axis=1))
