"""Effect of a finite sample on a spectrum: the error of its metrics, and their extrapolated
values."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from nerve.analysis.frames import require_columns
from nerve.analysis.gather import Block, frame_from_columns
from nerve.analysis.statistics import student_t
from nerve.derived import VERDICTS
from nerve.metric_names import SPREAD
from nerve.sites_and_groups import POOLED

ROW = ("run_id", "step", "layer", "ffn")
"""The columns that identify a row of metrics."""


MOST_MOVES = {"well": 0.05, "under": 0.20}
"""The largest relative change of PR, extrapolated to infinitely many samples, for each verdict."""


TRUSTED = 1 / 3
"""The additional standard error of an extrapolation, as a share of the extrapolated change: terms
beyond 1/N are neglected, which were 20 to 30% of it for N_eff/D of 6 and more."""

ORDERS: Mapping[str, float] = {"half": 0.5, "1": 1.0, "2": 2.0, "inf": np.inf}
"""The orders of the Rényi entropy, by their names in columns."""


def sampling_error(groups: pd.DataFrame) -> pd.DataFrame:
    """Extrapolates SE, PR and EEE to infinitely many samples, with their standard errors.

    The estimate uses halves of whole sequences: the covariance of N/2 samples differs from that of
    N as that of N does from the population's. SE, EEE and 1/PR are assumed to be linear in 1/N and
    extrapolated to 0.

    The error is that of `n_effective` independent Gaussian samples, times the metric's spread
    (`spectral_entropy_spread` and the like). `n_effective` follows from the difference of the
    halves' covariances, `|C_a - C_b|^2 = (tr(C)^2 + |C|^2) (1/n_a + 1/n_b) N/n_effective` in
    expectation: correlated tokens of a sequence and heavy tails reduce it. It is based on about PR
    (PR + 1) / 2 numbers, which are the degrees of freedom of the intervals. A third of the
    extrapolation is added to the error of a value, since terms beyond 1/N are neglected.

    Args:
        groups: rows of `load_groups`, with the grouping `halves`.

    Returns:
        One row per run, step, layer, FFN name and site (pre, post) with halves: `n_samples`,
        `n_effective`, and for each of se, pr and eee the measured value (`pr`), the value
        extrapolated to infinitely many samples (`pr_limit`), its standard error (`pr_error`), and
        its 95% interval (`pr_low`, `pr_high`). NaN where they cannot be estimated. `sampling` is
        the verdict from the change of PR between value and limit: `well` up to 5%, `under` up to
        20%, else `severely under`.

    Raises:
        ConfigError: for a frame without the columns of `load_groups`.
    """
    metrics = ("n_samples", "pr", "se", "eee", "variance")
    names = [*metrics, *(f"{name}_spread" for name in SPREAD)]
    keys = [*ROW, "site"]
    require_columns(groups, [*keys, "grouping", "group", *names], "load_groups")
    of_group = {
        group: groups[(groups["grouping"] == grouping) & (groups["group"] == group)]
        for grouping, group in ((POOLED, POOLED), ("halves", "a"), ("halves", "b"))
    }
    whole, a, b = (rows.set_index(keys)[names].astype(float) for rows in of_group.values())
    index = whole.index.intersection(a.index).intersection(b.index)
    whole, a, b = (rows.loc[index] for rows in (whole, a, b))
    with np.errstate(all="ignore"):
        found = _extrapolated(whole, a, b)
    return found.reset_index()


def _extrapolated(whole: pd.DataFrame, a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    n, n_a, n_b = whole["n_samples"], a["n_samples"], b["n_samples"]
    # |C|^2 of all samples and of each half; from these, an unbiased estimate of <C_a, C_b>.
    all_squares, a_squares, b_squares = (
        rows["variance"] ** 2 / rows["pr"] for rows in (whole, a, b)
    )
    share_a, share_b = (n_a - 1) / (n - 1), (n_b - 1) / (n - 1)
    # C = s_a C_a + s_b C_b + B, where B comes from the difference of the halves' means: its trace
    # is known, and its shape is assumed to be that of C.
    within = (share_a * a["variance"] + share_b * b["variance"]) / whole["variance"]
    product = within**2 * all_squares - share_a**2 * a_squares - share_b**2 * b_squares
    product = product / (2 * share_a * share_b)
    apart = a_squares + b_squares - 2 * product
    per_sample = whole["variance"] ** 2 + product
    n_effective = n * per_sample * (1 / n_a + 1 / n_b) / apart
    n_effective = n_effective.where((apart > 0) & (product > 0))
    # The distance of 1/n of the halves from that of all, in units of the latter: 1 for equal halves
    beyond = n * (1 / n_a + 1 / n_b) / 2 - 1
    result = pd.DataFrame({"n_samples": n.astype("int64"), "n_effective": n_effective})
    limits: dict[str, pd.Series] = {}
    ratios: dict[str, pd.Series | float] = {}
    for name in ("se", "eee"):
        halves = (a[name] + b[name]) / 2
        limits[name] = whole[name] - (halves - whole[name]) / beyond
        ratios[name] = 1.0
    inverse = (1 / a["pr"] + 1 / b["pr"]) / 2
    limit = 1 / whole["pr"] - (inverse - 1 / whole["pr"]) / beyond
    limits["pr"] = (1 / limit).where(limit > 0)
    ratios["pr"] = limits["pr"] / whole["pr"]
    free = (whole["pr"] * (whole["pr"] + 1) / 2).clip(1, 1e4).fillna(1)
    quantile = student_t(free.to_numpy().astype(np.int64))
    for name in SPREAD:
        of_samples = whole[f"{name}_spread"] * ratios[name] / np.sqrt(n_effective)
        error = np.hypot(of_samples, TRUSTED * (limits[name] - whole[name]))
        result[name], result[f"{name}_limit"] = whole[name], limits[name]
        result[f"{name}_error"] = error
        result[f"{name}_low"] = limits[name] - quantile * error
        result[f"{name}_high"] = limits[name] + quantile * error
    moves = (limits["pr"] / whole["pr"] - 1).abs()
    verdict = np.select(
        [moves <= MOST_MOVES[each] for each in VERDICTS[:2]], VERDICTS[:2], VERDICTS[2]
    )
    return result.assign(sampling=pd.Series(verdict, result.index).where(whole["pr"].notna()))


def codes_by_halves(codes: np.ndarray, rows: Block, groups: pd.DataFrame) -> np.ndarray:
    """The verdict on each row of metrics, as its index in `VERDICTS`: from halves if they were
    measured, the worse of pre and post.

    Args:
        codes: the verdicts from N/D, -1 if nothing was measured.
        rows: metrics with the columns `ROW`.
        groups: rows of `load_groups`.
    """
    if not (groups["grouping"] == "halves").any():
        return codes
    of_halves = sampling_error(groups).dropna(subset="sampling")
    worst = (
        of_halves["sampling"]
        .map(VERDICTS.index)
        .groupby([of_halves[name] for name in ROW], observed=True)
        .max()
    )
    places = pd.MultiIndex.from_frame(frame_from_columns({name: rows[name] for name in ROW}))
    found = worst.reindex(places).to_numpy(float)
    return np.where(np.isnan(found) | (codes < 0), codes, found).astype(np.int8)


def renyi_ranks(spectra: pd.DataFrame) -> pd.DataFrame:
    """Effective ranks of several orders for stored spectra, `(sum p^a)^(1 / (1 - a))` with the
    shares p = λ/Σλ.

    Each is the number of directions of a flat spectrum with the same Rényi entropy, in [1, D];
    higher orders give less weight to small eigenvalues. Order 1 is exp(SE), order 2 is PR, ∞ is
    1/p_1, and ½ gives the tail the most weight.

    Args:
        spectra: rows of `load_spectra`.

    Returns:
        The rows without their eigenvalues, with `rank_half`, `rank_1`, `rank_2`, `rank_inf`.
    """
    require_columns(spectra, ["eigenvalues"], "load_spectra")
    ranks = [
        [_rank(values, order) for order in ORDERS.values()] for values in spectra["eigenvalues"]
    ]
    columns = [f"rank_{name}" for name in ORDERS]
    frame = pd.DataFrame(ranks, index=spectra.index, columns=columns, dtype=float)
    return pd.concat([spectra.drop(columns="eigenvalues"), frame], axis=1)


def _rank(eigenvalues: np.ndarray, order: float) -> float:
    values = np.asarray(eigenvalues, float)
    total = values.sum()
    if not total > 0:
        return np.nan
    p = values[values > 0] / total
    if order == 1:
        return float(np.exp(-(p * np.log(p)).sum()))
    if np.isinf(order):
        return float(1 / p.max())
    return float((p**order).sum() ** (1 / (1 - order)))
