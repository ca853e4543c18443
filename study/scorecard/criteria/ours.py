"""Core checks of our own claims, 16 to 18, for which the sweeps `cause_*` were run.

The readings were written into the headers of these sweeps before their runs; the checks, which
express them in numbers, were not.
"""

import numpy as np

from criteria import values as v
from criteria.check import CoreCheck, Scale
from criteria.effects import Effect, descending, difference
from criteria.gpt import early_gain, loss_fall
from criteria.measured import Design, Measured

SHORT = Scale(12, 512, 1_000, 16e6)
PRE_SCALES: dict[str, Design] = {
    f"{name} {size:g}": {"normalization.kind": kind, "model.pre_std": size}
    for name, kind in (("PreLN", "layernorm"), ("norm-free", "none"))
    for size in (0.05, 0.15, 0.4, 1.0)
}
DOSES: dict[str, Design] = {
    f"alpha {alpha:g}": {"activation.alpha": alpha} for alpha in (0, 0.25, 0.5, 0.75, 1)
}
WEIGHTS: dict[str, Design] = {
    f"weight {weight:g}": {"activation.name": "gelu", "regularizer.weight": weight}
    for weight in (-0.02, -0.004, 0, 0.004, 0.02)
}
"""Of GELU alone, as `nerve.dose_response` pools errors; ReLU at -.02 is unstable."""
SOURCES = {
    16: ("cause_pre_scale_gpu", "cause_pre_scale"),
    17: ("cause_dose_gpu", "cause_dose"),
    18: ("cause_regularizer_gpu", "cause_regularizer"),
}
TITLES = {
    16: "Small inputs are why norm-free GELU is inert",
    17: "The spectrum carries what the nonlinearity does for the loss",
    18: "A wider spectrum lowers the loss",
}


def log_pr_post(runs: Measured) -> np.ndarray:
    """Mean over layers of log PR_post at the end, shape (run,)."""
    return v.final(np.log(runs.spectra["pr_post"]).mean(axis=2))


def check(
    name: str,
    states: str,
    effect: str,
    estimate: Effect,
    designs: dict[str, Design],
    compared: tuple[str, ...],
    smallest: float = 0.0,
    why: str = "",
) -> CoreCheck:
    """A check of three seeds at 12 × 512; the paper has no value for it."""
    return CoreCheck(
        name,
        states,
        effect,
        estimate,
        designs,
        compared,
        SOURCES[int(name.partition(".")[0])],
        "design",
        seeds=3,
        scale=SHORT,
        paper="–",
        smallest=smallest,
        why=why,
    )


ALPHAS = tuple(DOSES)

CHECKS = (
    check(
        "16.free",
        "without norms, larger inputs let training raise the early PR gain",
        "log PR gain of layers 0 to 6, end minus step 0, SD(u) .15 minus .05; nats",
        difference(early_gain, "norm-free 0.15", "norm-free 0.05"),
        PRE_SCALES,
        ("norm-free 0.15", "norm-free 0.05"),
        smallest=0.4,
        why="at SD(u) .4 and 1 all norm-free runs of 12 × 512 diverged",
    ),
    check(
        "16.preln",
        "with norms, inputs as small as those without let training raise it less",
        "log PR gain of layers 0 to 6, end minus step 0, SD(u) 1 minus .05; nats",
        difference(early_gain, "PreLN 1", "PreLN 0.05"),
        PRE_SCALES,
        ("PreLN 1", "PreLN 0.05"),
        smallest=0.4,
    ),
    check(
        "17.loss",
        "the loss falls with every step from the identity to GELU",
        "loss, the smallest fall in four steps of a quarter; nats",
        descending(loss_fall, *reversed(ALPHAS)),
        DOSES,
        ALPHAS,
    ),
    check(
        "17.post",
        "and PR_post rises with every such step",
        "mean over layers of log PR_post, the smallest rise of four; nats",
        descending(log_pr_post, *reversed(ALPHAS)),
        DOSES,
        ALPHAS,
        why="if the loss falls where PR_post does not rise, the spectrum does not carry it",
    ),
    check(
        "18.wider",
        "raising PR_post by a term of the loss lowers the cross-entropy",
        "loss, weight 0 minus weight -.004, GELU; nats",
        difference(loss_fall, "weight -0.004", "weight 0"),
        WEIGHTS,
        ("weight -0.004", "weight 0"),
        why="the weight raises PR_post 3.4 times at 12 × 512; ReLU is reported separately",
    ),
    check(
        "18.narrower",
        "and lowering it raises the cross-entropy",
        "loss, weight .004 minus weight 0, GELU; nats",
        difference(loss_fall, "weight 0", "weight 0.004"),
        WEIGHTS,
        ("weight 0.004", "weight 0"),
    ),
)
