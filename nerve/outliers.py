"""Which rows of metrics may be those of a few samples: massive activations, first tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from nerve.metric_names import SITES

LARGEST_MOVES = 0.10
"""A row is flagged where the farthest sample alone may move PR by more than this."""

TOP_MULTIPLE = 16
"""… or where the farthest 0.1% hold more than so many times what they would if all were as far.
Many alike move PR together, and none of them alone."""

POSITION_RATIO = 4
"""… or where the samples of one position of the sequences, such as the first tokens, lie at more
than so many times the mean squared distance: too many for the farthest 0.1%."""

OF_CHANNELS = "token_mixing"
"""The FFN of a Mixer whose samples stand side by side as channels, of which each has a spread of
its own by nature, and not as positions."""

_NEEDED = ("largest_share", "top_share", "position_ratio", "pr")


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
    the farthest sample alone may have moved PR by more than `LARGEST_MOVES` (`largest_move`), the
    farthest 0.1% stand out by `TOP_MULTIPLE`, or one position by `POSITION_RATIO`. One sample that
    does move PR by more than 10% is always found. Of many alike those are found whose squared
    distance is 16 times the average, and 4 times where they share a position.

    Args:
        rows: with `ffn`, `n_samples`, and `pr_*`, `largest_share_*`, `top_share_*`,
            `position_ratio_*` of both sites.
    """
    names = ("n_samples", *(f"{name}_{site}" for name in _NEEDED for site in SITES))
    columns = {name: rows[name].to_numpy(float) for name in names}
    code, texts = outlier_codes(columns, (rows["ffn"] == OF_CHANNELS).to_numpy())
    return pd.Series(np.array(texts, dtype=object)[code], index=rows.index, dtype=object)


def outlier_codes(
    columns: Mapping[str, np.ndarray], is_of_channels: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """What `outliers` says of rows, as the numbers of texts, and the texts.

    Args:
        columns: arrays, of the names that `outliers` takes but for `ffn`.
        is_of_channels: which rows are of an FFN whose samples are channels.
    """
    code = np.zeros(len(is_of_channels), dtype=np.int8)
    texts = [""]
    for site in SITES:  # each doubles the texts: with it, or without
        code += _stands_out(columns, is_of_channels, site) * np.int8(len(texts))
        texts += [f"{text}, {site}" if text else site for text in texts]
    return code, tuple(texts)


def describe_outliers(row: Mapping[Any, Any], site: str) -> str:
    """`post: the farthest sample holds 41.2% of the variance, the farthest 0.1% 99.9%, one position
    of the sequences is at 37 times the mean squared distance`."""
    parts = [
        text.format(row[f"{name}_{site}"])
        for name, text in (
            ("largest_share", "the farthest sample holds {:.1%} of the variance"),
            ("top_share", "the farthest 0.1% {:.1%}"),
            (
                "position_ratio",
                "one position of the sequences is at {:,.1f} times the mean squared distance",
            ),
        )
        if row[f"{name}_{site}"] is not None and not np.isnan(row[f"{name}_{site}"])
    ]
    return f"{site}: {', '.join(parts)}"


def _stands_out(
    columns: Mapping[str, np.ndarray], is_of_channels: np.ndarray, site: str
) -> np.ndarray:
    n_samples = columns["n_samples"].astype(float)
    largest, top, position, ratio = (columns[f"{name}_{site}"] for name in _NEEDED)
    fair = np.ceil(n_samples / 1000) / np.maximum(n_samples, 1)
    return (
        (largest_move(largest, ratio) > LARGEST_MOVES)
        | (top > TOP_MULTIPLE * fair)
        | ((position > POSITION_RATIO) & ~is_of_channels)
    )
