"""Which rows of metrics may be those of a few samples: massive activations, first tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

SITES = ("pre", "post")

LARGEST_MOVES = 0.10
"""A row is flagged where the farthest sample alone may move PR by more than this."""

TOP_MOVES = 0.50
"""… or where the farthest 0.1% may by more than this. Any data have a farthest 0.1%, whose bound
is loose for many samples in many directions; so it takes more."""


def largest_move(share: ArrayLike, participation_ratio: ArrayLike) -> np.ndarray:
    """By what part samples with this share of the variance may have moved PR, at most.

    With s their share, C' the covariance (of trace 1) of the others and G that of theirs, `C =
    (1-s) C' + s G`, and `(1-s) |C'| <= |C| <= (1-s) |C'| + s` in the Frobenius norm, where `PR =
    1/|C|^2`. So PR is between `((1 - s sqrt(PR)) / (1-s))^2` and `1/(1-s)^2` times what it is
    without them; infinite where the first is 0. NaN for a share that is not known.

    Source: ours.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        s, root = np.asarray(share, float), np.sqrt(np.asarray(participation_ratio, float))
        raised = (1 - s) ** -2.0
        lowered = np.where(s * root < 1, ((1 - s) / (1 - s * root)) ** 2, np.inf)
        lowered = np.where(np.isnan(s * root), np.nan, lowered)
        return np.maximum(raised, lowered) - 1


def outliers(rows: pd.DataFrame) -> pd.Series:
    """Of each row of metrics the sites whose PR may be that of a few samples.

    `pre`, `post`, `pre, post`, or empty, as where the shares were not stored. At a site so named
    the farthest sample may have moved PR by more than `LARGEST_MOVES`, or the farthest 0.1% by more
    than `TOP_MOVES` (`largest_move`). A sample that does move PR by more than 10% is always found;
    many alike are as far as the farthest 0.1% show them.

    Args:
        rows: with `pr_*`, `largest_share_*` and `top_share_*` of both sites.
    """
    named = [np.where(_stands_out(rows, site), site, "") for site in SITES]
    texts = [", ".join(filter(None, sites)) for sites in zip(*named, strict=True)]
    return pd.Series(texts, index=rows.index, dtype=object)


def describe_outliers(row: Mapping[Any, Any], site: str) -> str:
    """`post: the farthest sample holds 41.2% of the variance, the farthest 0.1% 99.9%`."""
    largest, top = row[f"largest_share_{site}"], row[f"top_share_{site}"]
    parts = [
        f"{name} {share:.1%}{unit}"
        for name, share, unit in (
            ("the farthest sample holds", largest, " of the variance"),
            ("the farthest 0.1%", top, ""),
        )
        if share is not None and not np.isnan(share)
    ]
    return f"{site}: {', '.join(parts)}"


def _stands_out(rows: pd.DataFrame, site: str) -> np.ndarray:
    ratio = rows[f"pr_{site}"].to_numpy(float)
    by_one = largest_move(rows[f"largest_share_{site}"].to_numpy(float), ratio)
    by_top = largest_move(rows[f"top_share_{site}"].to_numpy(float), ratio)
    return (by_one > LARGEST_MOVES) | (by_top > TOP_MOVES)
