"""Columns derived from the stored columns of metrics: further metrics, whether a few samples may
dominate the spectrum (massive activations, first tokens), and whether there were enough samples."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from nerve.metric_names import SAMPLES_PER_DIMENSION, STORED
from nerve.sites_and_groups import SITES

VERDICTS = ("well", "under", "severely under")


LEAST_RATIO = {"well": float(SAMPLES_PER_DIMENSION), "under": 2.0}
"""The smallest N/D for each verdict, if no halves were measured."""


Columns = Mapping[str, np.ndarray]

_OF_A_SITE: dict[str, Callable[[Columns, str], np.ndarray]] = {
    "exp_se_{site}": lambda rows, site: np.exp(rows[f"se_{site}"]),
    # With one feature, ln D = 0 and the entropy cannot be normalized.
    "se_{site}_normalized": lambda rows, site: (
        rows[f"se_{site}"] / np.log(np.where(rows["d_ff"] > 1, rows["d_ff"], np.nan))
    ),
    "pr_{site}_fraction": lambda rows, site: rows[f"pr_{site}"] / rows["d_ff"],
    "rank_limit_{site}": lambda rows, site: _rank_limit(rows, site),
}
_OF_BOTH: dict[str, Callable[[Columns], np.ndarray]] = {
    "pr_gain": lambda rows: rows["pr_post"] / rows["pr_pre"],
    "delta_eee": lambda rows: rows["eee_post"] - rows["eee_pre"],
}


def derived_columns(rows: Columns) -> dict[str, np.ndarray]:
    """Every derived column of the catalog, computed from arrays of the stored ones."""
    with np.errstate(all="ignore"):
        of_sites = {
            column.format(site=site): derive(rows, site)
            for column, derive in _OF_A_SITE.items()
            for site in SITES
        }
        return of_sites | {column: derive(rows) for column, derive in _OF_BOTH.items()}


def with_derived(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of metrics with every derived column of the catalog, and `outliers`."""
    # In rows that were never stored, a numeric column may contain only None.
    none = [name for name in STORED if name in rows and rows[name].dtype == object]
    if none:
        rows = rows.astype(dict.fromkeys(none, float))
    columns: Any = {str(name): values.to_numpy() for name, values in rows.items()}
    return rows.assign(**derived_columns(columns), outliers=outliers(rows))


def _rank_limit(rows: Columns, site: str) -> np.ndarray:
    """The maximum rank: before the nonlinearity, features are a linear map of `d_in` numbers."""
    width = np.minimum(rows["d_in"], rows["d_ff"]) if site == "pre" else rows["d_ff"]
    return np.minimum(width, rows["n_samples"] - 1).astype(rows["d_ff"].dtype)


LARGEST_MOVES = 0.10
"""A row is flagged if the farthest sample alone may move PR by more than this."""


TOP_MULTIPLE = 16
"""… or if the farthest 0.1% hold more than this multiple of their proportional share of the
variance. Many similar samples move PR together, although none of them does alone."""


POSITION_RATIO = 4
"""… or if the samples at one position of the sequences, such as the first tokens, have more than
this multiple of the mean squared distance; they may be too many for the farthest 0.1%."""


OF_CHANNELS = "token_mixing"
"""The FFN of a Mixer whose samples are channels, not positions; each channel has its own spread."""


_NEEDED = ("largest_share", "top_share", "position_ratio", "pr")


def sampling(rows: pd.DataFrame) -> pd.Series:
    """The verdict on each row of metrics by N/D, one of `VERDICTS`; NaN if nothing was measured.

    Args:
        rows: has `n_samples`, `d_ff` and `status`.
    """
    columns = {name: rows[name].to_numpy() for name in ("n_samples", "d_ff")}
    codes = sampling_codes(columns, (rows["status"] == "ok").to_numpy())
    return pd.Series(np.array([*VERDICTS, np.nan], object)[codes], rows.index, object)


def sampling_codes(columns: Columns, is_measured: np.ndarray) -> np.ndarray:
    """The verdict on each row of metrics by N/D, as its index in `VERDICTS`; -1 if nothing was
    measured.

    Args:
        columns: has `n_samples` and `d_ff`.
        is_measured: whether each row was measured.
    """
    ratio = columns["n_samples"] / columns["d_ff"]
    verdict = np.full(len(ratio), 2, np.int8)
    for place in (1, 0):
        verdict[ratio >= LEAST_RATIO[VERDICTS[place]]] = place
    return np.where(is_measured, verdict, np.int8(-1))


def largest_move(share: ArrayLike, participation_ratio: ArrayLike) -> np.ndarray:
    """The largest relative change of PR that samples with this share of the variance can cause.

    With s their share, G their covariance and C' that of the other samples (both of trace 1),
    `C = (1-s) C' + s G`, and `(1-s) |C'| <= |C| <= (1-s) |C'| + s` in the Frobenius norm, where
    `PR = 1/|C|^2`. So PR is between `((1 - s sqrt(PR)) / (1-s))^2` and `1/(1-s)^2` times its value
    without them; infinite if the first is 0. NaN for an unknown share.

    Source: ours.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        s, root = np.asarray(share, float), np.sqrt(np.asarray(participation_ratio, float))
        raised = (1 - s) ** -2.0
        lowered = np.where(s * root < 1, ((1 - s) / (1 - s * root)) ** 2, np.inf)
        lowered = np.where(np.isnan(s * root), np.nan, lowered)
        return np.maximum(raised, lowered) - 1


def outliers(rows: pd.DataFrame) -> pd.Series:
    """The sites of each row of metrics whose PR may be dominated by a few samples.

    `pre`, `post`, `pre, post`, or empty, also if the shares were not stored. At these sites, the
    farthest sample alone may have moved PR by more than `LARGEST_MOVES` (`largest_move`), the
    farthest 0.1% stand out by `TOP_MULTIPLE`, or one position by `POSITION_RATIO`. A single sample
    that moves PR by more than 10% is always found. Many similar samples are found if their squared
    distance is 16 times the average, or 4 times if they share a position.

    Args:
        rows: has `ffn`, `n_samples`, and `pr_*`, `largest_share_*`, `top_share_*`,
            `position_ratio_*` of both sites.
    """
    names = ("n_samples", *(f"{name}_{site}" for name in _NEEDED for site in SITES))
    columns = {name: rows[name].to_numpy(float) for name in names}
    code, texts = outlier_codes(columns, (rows["ffn"] == OF_CHANNELS).to_numpy())
    return pd.Series(np.array(texts, dtype=object)[code], index=rows.index, dtype=object)


def outlier_codes(
    columns: Mapping[str, np.ndarray], is_of_channels: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The values of `outliers` as integer codes, and the strings that they stand for.

    Args:
        columns: arrays of the columns that `outliers` takes, except `ffn`.
        is_of_channels: whether the samples of each row are channels.
    """
    code = np.zeros(len(is_of_channels), dtype=np.int8)
    texts = [""]
    for site in SITES:  # each doubles the strings: with the site, and without
        code += _stands_out(columns, is_of_channels, site) * np.int8(len(texts))
        texts += [f"{text}, {site}" if text else site for text in texts]
    return code, tuple(texts)


def describe_outliers(row: Mapping[Any, Any], site: str) -> str:
    """`the farthest sample holds 41.2% of the variance, the farthest 0.1% of the samples hold
    99.9%, those at one position have 37 times the mean squared distance`."""
    texts = {
        "largest_share": "the farthest sample holds {:.1%} of the variance",
        "top_share": "the farthest 0.1% of the samples hold {:.1%}",
        "position_ratio": "those at one position have {:,.1f} times the mean squared distance",
    }
    if row["ffn"] == OF_CHANNELS:  # whose samples are channels, not positions
        del texts["position_ratio"]
    values = ((text, row[f"{name}_{site}"]) for name, text in texts.items())
    return ", ".join(
        text.format(value) for text, value in values if value is not None and not np.isnan(value)
    )


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
