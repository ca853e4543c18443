"""Core checks of claims 1 to 10: the nonlinearity, tracking, widths, norms and positions."""

import numpy as np

from criteria import values as v
from criteria.check import CoreCheck, Scale
from criteria.designs import (
    ACTIVATIONS,
    CONSTRAINTS,
    GELU,
    LONG,
    NORM_FREE,
    NORMS,
    PLACEMENTS,
    POSITIONS,
    PRELN,
    RELU,
    THOUSANDS,
    all_placements_trained,
    largest,
    most_complete_rate,
    widths,
)
from criteria.effects import beyond_the_start, descending, difference, mean, steeper
from criteria.measured import Measured

EARLY = 7 / 12
"""Through layer 6 of 12."""


def pr_gain(runs: Measured) -> np.ndarray:
    """log of PR_post over PR_pre, each a mean over layers, end minus step 0."""
    post, pre = (v.mean_of(runs, f"pr_{site}", log=True) for site in ("post", "pre"))
    return v.gained(post - pre)


def eee_fall(runs: Measured) -> np.ndarray:
    return v.gained(v.mean_of(runs, "eee_pre") - v.mean_of(runs, "eee_post"))


def loss_fall(runs: Measured) -> np.ndarray:
    """The final loss, negative: higher is better."""
    return -v.final(runs.loss)


def log_pr_post(runs: Measured) -> np.ndarray:
    return v.final(v.mean_of(runs, "pr_post", log=True))


def gained_pr_post(runs: Measured) -> np.ndarray:
    return v.gained(v.mean_of(runs, "pr_post", log=True))


def early_gain(runs: Measured) -> np.ndarray:
    return v.gained(v.log_gain(runs, 0, EARLY).mean(axis=2))


def first_gain(runs: Measured) -> np.ndarray:
    return v.gained(v.log_gain(runs, 0, 1 / 3).max(axis=2))


ACTIVATION = {
    "sources": ("paper_activation_gpu", "paper_normfree_gpu", "activation_gpu"),
    "designs": NORMS | ACTIVATIONS,
    "narrow": largest,
}
NORMFREE = {"sources": ("paper_normfree_gpu", "normfree_gpu"), "designs": NORMS, "scale": LONG}
WIDTH = {"sources": ("paper_width_gpu", "ffn_width_gpu"), "narrow": most_complete_rate}
ALONE = ACTIVATION | {
    "compared": ("PreLN GELU",),
    "labels": "step",
    "seeds": 2,
    "scale": THOUSANDS,
}
AGAINST_RELU = ACTIVATION | {
    "compared": ("PreLN GELU", "PreLN ReLU"),
    "labels": "design",
    "seeds": 5,
    "scale": THOUSANDS,
}
CONSTRAINT = {
    "designs": CONSTRAINTS,
    "compared": ("spectral_norm", "hyperspherical"),
    "sources": ("paper_constraint_gpu", "ffn_constraint_gpu"),
    "labels": "design",
    "seeds": 3,
    "scale": LONG,
}
PLACEMENT = {"designs": PLACEMENTS, "labels": "design", "narrow": all_placements_trained}
POSITION = {
    "designs": POSITIONS,
    "compared": ("rope", "none"),
    "sources": ("paper_position_gpu", "position_gpu"),
    "labels": "design",
    "seeds": 2,
    "scale": THOUSANDS,
}

CHECKS = (
    CoreCheck(
        "1.pr",
        "training raises the PR gain of the nonlinearity",
        "log PR_post/PR_pre, each a mean over layers, end minus step 0; nats",
        mean(pr_gain, "PreLN GELU"),
        paper="1.93 at the end (step 0 not given)",
        paper_value=1.93,
        smallest=0.1,
        why="the shift itself is there at step 0; the check is about what training adds",
        **ALONE,
    ),
    CoreCheck(
        "1.eee",
        "training deepens the fall of EEE from pre to post",
        "EEE_pre - EEE_post, mean over layers, end minus step 0",
        mean(eee_fall, "PreLN GELU"),
        paper="0.475 at the end (step 0 not given)",
        paper_value=0.475,
        smallest=0.02,
        **ALONE,
    ),
    CoreCheck(
        "2.loss",
        "GELU has a lower loss than ReLU",
        "loss, ReLU minus GELU; nats",
        difference(loss_fall, "PreLN GELU", "PreLN ReLU"),
        paper="0.022",
        paper_value=0.022,
        **AGAINST_RELU,
    ),
    CoreCheck(
        "2.pr",
        "GELU keeps more dimensions after the nonlinearity than ReLU",
        "log of mean PR_post, GELU minus ReLU; nats",
        difference(log_pr_post, "PreLN GELU", "PreLN ReLU"),
        paper="0.36",
        paper_value=0.36,
        smallest=0.1,
        **AGAINST_RELU,
    ),
    CoreCheck(
        "3.band",
        "JS of layers 2 to 4 of 12 lies above that of layer 0 and of the deeper half",
        "lowest JS in the band minus the highest outside; nats",
        mean(v.band, "PreLN GELU"),
        paper="peak .28, layer 0 low",
        why="a peak alone is not a band, and with permuted layers the band must disappear",
        **ALONE | {"labels": "layer"},
    ),
    *(
        CoreCheck(
            f"4.{name}",
            f"{title} follows the loss within a run beyond the clock",
            f"-r of {title} and loss over checkpoints after warm-up, given log(step + 1)",
            mean(lambda runs, name=name: v.tracking(runs, name), "PreLN GELU"),
            paper=paper,
            smallest=0.3,
            why=why,
            **ALONE,
        )
        for name, title, paper, why in (
            (
                "pr_pre",
                "PR_pre",
                ".97 to .99, not given the clock",
                "log(step + 1) alone has r = -.99; only the correlation beyond it counts",
            ),
            ("se_post", "SE_post", ".84 to .87, not given the clock", ""),
        )
    ),
    *(
        CoreCheck(
            f"5.{name}",
            f"{title}: the final SE_post follows the loss across widths beyond the untrained one",
            "-r of SE_post and loss over runs, given SE_post at step 0",
            beyond_the_start(lambda runs: v.mean_of(runs, "se_post")),
            widths(design),
            ("width 1", "width 2", "width 4", "width 8"),
            labels="spectrum",
            seeds=8,
            unit="runs",
            scale=THOUSANDS,
            paper=paper,
            why=why,
            **WIDTH,
        )
        for name, title, design, paper, why in (
            (
                "preln",
                "PreLN GELU",
                PRELN | GELU,
                "1.00, given nothing",
                "width alone ranks the losses (-.92), and the untrained SE_post follows the width",
            ),
            ("normfree", "norm-free ReLU", NORM_FREE | RELU, ".99, given nothing", ""),
        )
    ),
    CoreCheck(
        "6.inertia",
        "without norms, training brings less PR gain to GELU's layers 0 to 6 than with them",
        "log PR gain, mean over layers, end minus step 0, PreLN minus norm-free; nats",
        difference(early_gain, "PreLN GELU", "norm-free GELU"),
        compared=("PreLN GELU", "norm-free GELU"),
        labels="design",
        seeds=2,
        paper="about 1.9 at the end (norm-free: 0)",
        paper_value=1.9,
        smallest=0.4,
        why="small inputs make GELU linear already at step 0; the claim is about training",
        **NORMFREE,
    ),
    CoreCheck(
        "6.price",
        "without norms, GELU has a higher loss than ReLU",
        "loss, norm-free GELU minus norm-free ReLU; nats",
        difference(loss_fall, "norm-free ReLU", "norm-free GELU"),
        compared=("norm-free ReLU", "norm-free GELU"),
        labels="design",
        seeds=2,
        paper="0.076",
        paper_value=0.076,
        **NORMFREE,
    ),
    *(
        CoreCheck(
            f"7.{name}",
            f"without norms, training raises {title}'s largest PR gain of the first layers above "
            "that of PreLN GELU",
            "log of the largest PR gain of layers 0 to 3, end minus step 0, minus PreLN GELU; nats",
            difference(first_gain, design, "PreLN GELU"),
            compared=(design, "PreLN GELU"),
            labels="design",
            seeds=2,
            paper="about 3.7 at the end (gain 290)",
            paper_value=3.7,
            smallest=0.7,
            **NORMFREE,
        )
        for name, title, design in (
            ("relu", "ReLU", "norm-free ReLU"),
            ("leaky", "learnable leaky ReLU", "norm-free leaky"),
        )
    ),
    CoreCheck(
        "8.loss",
        "without norms, spectral norm has a lower loss than hyperspherical weights",
        "loss, hyperspherical minus spectral norm; nats",
        difference(loss_fall, "spectral_norm", "hyperspherical"),
        paper="0.040",
        paper_value=0.040,
        **CONSTRAINT,
    ),
    CoreCheck(
        "8.flat",
        "and training makes its nonlinearity flatten more",
        "EEE_pre - EEE_post, mean over layers, end minus step 0, spectral norm minus "
        "hyperspherical",
        difference(eee_fall, "spectral_norm", "hyperspherical"),
        paper="not known",
        why="the paper's best and worst; constraints differ in EEE_post already at step 0",
        **CONSTRAINT,
    ),
    CoreCheck(
        "9.order",
        "at width 8 PreLN keeps more dimensions than MixLN, and MixLN more than PostLN",
        "log of mean PR_post, the smaller difference between neighbors; nats",
        descending(log_pr_post, "PreLN 8", "MixLN 8", "PostLN 8"),
        compared=("PreLN 8", "MixLN 8", "PostLN 8"),
        seeds=3,
        scale=Scale(12, 768, 1_500, 98e6),
        paper="2.06 and 1.19",
        paper_value=1.19,
        smallest=0.1,
        why="runs at the unigram loss are flagged, because an untrained PostLN is no evidence",
        sources=("paper_placement_gpu", "norm_placement_gpu"),
        **PLACEMENT,
    ),
    CoreCheck(
        "9.returns",
        "training makes PR_post grow faster with width under PreLN than under PostLN",
        "exponent of mean PR_post over width, end minus step 0, PreLN minus PostLN",
        steeper(gained_pr_post, "PreLN", "PostLN"),
        compared=("PreLN 8", "PreLN 4", "PreLN 1", "PostLN 1", "PostLN 4", "PostLN 8"),
        seeds=4,
        unit="runs",
        scale=THOUSANDS,
        paper="diminishing returns under PostLN",
        why="untrained networks already differ in the exponent",
        sources=("paper_width_placement_gpu", "norm_placement_gpu"),
        **PLACEMENT,
    ),
    CoreCheck(
        "10.loss",
        "RoPE has a lower loss than no position encoding",
        "loss, none minus RoPE; nats",
        difference(loss_fall, "rope", "none"),
        paper="0.099",
        paper_value=0.099,
        **POSITION,
    ),
    CoreCheck(
        "10.deep",
        "RoPE keeps more dimensions in middle and deep layers",
        "log of mean PR_post of the last two thirds of the layers, RoPE minus none; nats",
        difference(
            lambda runs: v.final(v.mean_of(runs, "pr_post", 1 / 3, 1, log=True)), "rope", "none"
        ),
        paper="not known",
        smallest=0.1,
        **POSITION,
    ),
)
