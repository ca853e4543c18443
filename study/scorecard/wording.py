"""Formats numbers and names for the page."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

Values = Sequence[float] | np.ndarray | pd.Series
"""One number per seed or layer."""

MISSING = "–"
LABELS = {
    "gelu": "GELU",
    "relu": "ReLU",
    "silu": "SiLU",
    "learnable_leaky_relu": "learnable leaky ReLU",
    "adamw": "AdamW",
    "sgd": "SGD",
    "adafactor": "Adafactor",
    "muon": "Muon",
    "dion": "Dion",
    "soap": "SOAP",
    "shampoo": "Shampoo",
    "rope": "RoPE",
    "pre": "PreLN",
    "post": "PostLN",
    "mix": "MixLN",
    "pre_residual_after_norm": "residual after the norm",
    "weight_norm": "weight norm",
    "spectral_norm": "spectral norm",
    "layernorm": "PreLN",
    "se_pre": "SE_pre",
    "se_post": "SE_post",
    "pr_pre": "PR_pre",
    "pr_post": "PR_post",
    "eee_pre": "EEE_pre",
    "eee_post": "EEE_post",
    "js": "JS",
    "pr_gain": "PR gain",
    "token_mixing": "token mixing",
    "channel_mixing": "channel mixing",
    "all": "all steps",
    "after_warmup": "after warm-up",
    "differences": "first differences",
}


def label(level: str) -> str:
    """The name of a configuration value or column in prose; others are unchanged."""
    return LABELS.get(level, level)


def number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits; without decimals from 10^digits on."""
    if not np.isfinite(value):
        return MISSING
    text = f"{value:#.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    return f"{value:,.0f}" if "e+" in text else text.rstrip(".")


def spread(values: Values, digits: int = 3) -> str:
    """The mean over seeds, with the lowest and the highest seed."""
    if not len(values):
        return MISSING
    low, high = (number(end, digits) for end in (min(values), max(values)))
    return low if low == high else f"{mean(values, digits)} ({low} to {high})"


def mean(values: Values, digits: int = 3) -> str:
    """The mean over seeds."""
    return number(float(np.mean(values)), digits) if len(values) else MISSING


def loss(values: Values) -> str:
    """`spread` with four digits, as needed to distinguish losses."""
    return spread(values, 4)


def perplexity(values: Values) -> str:
    """`spread` of the perplexity per token, exp(loss)."""
    return spread(np.exp(values), 4)


def mean_perplexity(values: Values) -> str:
    """`mean` of the perplexity per token."""
    return mean(np.exp(values), 4)


def coefficient(value: float) -> str:
    """A correlation or an exponent."""
    return f"{value:.2f}" if np.isfinite(value) else MISSING


def interval(value: float, low: float, high: float) -> str:
    """A coefficient and its 95% interval, if it has one."""
    bounds = f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else ""
    return coefficient(value) + bounds


def percent(share: float) -> str:
    """A share with two significant digits."""
    return f"{number(100 * share, 2)}%"


def over_layers(values: Values, digits: int = 3) -> str:
    """Mean ± sample SD."""
    return f"{number(float(np.mean(values)), digits)} ± {number(float(np.std(values, ddof=1)), 2)}"
