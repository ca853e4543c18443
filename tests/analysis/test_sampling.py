"""The sampling error estimated from halves, against samples whose true values are known; ranks
against formulas."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from nerve.analysis.gather import columns_of
from nerve.analysis.sampling import codes_by_halves, renyi_ranks, sampling_error
from nerve.derived import VERDICTS
from nerve.metric_names import SPREAD
from nerve.spectra.metrics import OF_A_GROUP

D, LENGTH, DRAWS = 24, 16, 500
TRUE = 1 / np.arange(1.0, D + 1)
"""Eigenvalues of the covariance that samples are drawn from."""


def sequences(n: int, correlation: float, seed: int) -> np.ndarray:
    """Gaussian sequences `[draws, n, length, D]`, each an AR(1) process over its positions."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((DRAWS, n, LENGTH, D))
    x = np.empty_like(noise)
    x[:, :, 0] = noise[:, :, 0]
    for t in range(1, LENGTH):
        x[:, :, t] = correlation * x[:, :, t - 1] + np.sqrt(1 - correlation**2) * noise[:, :, t]
    return x * np.sqrt(TRUE)


def metrics_of(x: np.ndarray) -> pd.DataFrame:
    """The columns of `groups` for the samples of each draw, `[draws, N, D]`, from NumPy's
    eigenvalues."""
    centered = x - x.mean(1, keepdims=True)
    covariance = np.einsum("bni,bnj->bij", centered, centered, optimize=True) / (x.shape[1] - 1)
    values = torch.from_numpy(np.linalg.eigvalsh(covariance).clip(0)[:, ::-1].copy())
    columns = {name: of(values, x.shape[1]).numpy() for name, of in OF_A_GROUP.items()}
    return pd.DataFrame(columns).assign(n_samples=x.shape[1], run_id=range(DRAWS))


def groups_of(x: np.ndarray) -> pd.DataFrame:
    """Rows of `groups` for all samples and for halves of whole sequences."""
    parts = {("all", "all"): x, ("halves", "a"): x[:, ::2], ("halves", "b"): x[:, 1::2]}
    place = {"step": 0, "layer": 0, "ffn": "ffn", "site": "post"}
    return pd.concat(
        metrics_of(part.reshape(DRAWS, -1, D)).assign(grouping=grouping, group=group, **place)
        for (grouping, group), part in parts.items()
    )


def truth() -> dict[str, float]:
    values = torch.from_numpy(TRUE)
    return {name: float(OF_A_GROUP[name](values, 1)) for name in SPREAD}


@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_intervals_from_halves_cover_the_truth_without_being_too_wide(correlation):
    """For independent and correlated samples: in 90 to 99% of 500 draws, and on each side at most 3
    times the standard error of the draws themselves."""
    groups = groups_of(sequences(24, correlation, seed=1))
    found = sampling_error(groups)
    assert len(found) == DRAWS
    for name, value in truth().items():
        covered = (found[f"{name}_low"] <= value) & (value <= found[f"{name}_high"])
        half_width = (found[f"{name}_high"] - found[f"{name}_low"]) / 2
        assert 0.90 <= covered.mean() <= 0.99, name
        assert half_width.mean() <= 3 * found[name].std(), name


def test_the_extrapolated_value_is_closer_to_the_truth_than_the_measured_one():
    """N/D = 16 with correlated samples: most of the error of PR is bias, which is removed."""
    found = sampling_error(groups_of(sequences(24, 0.7, seed=2)))
    for name, value in truth().items():
        bias, left = abs(found[name].mean() - value), abs(found[f"{name}_limit"].mean() - value)
        assert left < bias / 3, name


def test_n_effective_is_n_for_independent_samples_and_smaller_for_correlated_ones():
    """For second moments of long AR(1) sequences, it is the number times (1 - r²)/(1 + r²)."""
    alone = sampling_error(groups_of(sequences(24, 0.0, seed=3)))["n_effective"]
    assert alone.median() == pytest.approx(24 * LENGTH, rel=0.15)
    r = 0.7
    bound = sum(2 * (1 - k / LENGTH) * r ** (2 * k) for k in range(1, LENGTH)) + 1
    correlated = sampling_error(groups_of(sequences(24, r, seed=4)))["n_effective"]
    assert correlated.median() == pytest.approx(24 * LENGTH / bound, rel=0.15)


@pytest.mark.parametrize("name", SPREAD)
def test_spreads_are_the_standard_errors_of_many_independent_samples(name):
    """Over 500 draws with N/D = 16, times √N."""
    values = metrics_of(sequences(24, 0.0, seed=5).reshape(DRAWS, -1, D))
    spread = float(OF_A_GROUP[f"{name}_spread"](torch.from_numpy(TRUE), 1))
    assert values[name].std() * np.sqrt(24 * LENGTH) == pytest.approx(spread, rel=0.12)


def row(**values: object) -> dict:
    place = {"run_id": "a", "step": 0, "layer": 0, "ffn": "ffn", "status": "ok"}
    return place | {"n_samples": 800, "d_ff": 100} | values


@pytest.mark.parametrize(
    ("half", "expected"),
    [(9.6, "well"), (8.7, "under"), (6.0, "severely under"), (4.9, "severely under")],
)
def test_the_sampling_verdict_follows_from_the_extrapolated_change_of_pr(half, expected):
    """1/PR of all samples is 0.1; extrapolated it is 0.2 - 1/half, and values of 0 or less are no
    limit. The worse of pre and post counts."""
    place = {"run_id": "a", "step": 0, "layer": 0, "ffn": "ffn", "se": 2.0, "eee": 0.5}
    place |= {"variance": 1.0, **{f"{name}_spread": 1.0 for name in SPREAD}}
    groups = pd.DataFrame(
        {**place, "site": site, "grouping": grouping, "group": group, "n_samples": n, "pr": pr}
        for site, of_half in (("pre", 10.0), ("post", half))
        for grouping, group, n, pr in (
            ("all", "all", 800, 10.0), ("halves", "a", 400, of_half), ("halves", "b", 400, of_half),
        )
    )  # fmt: skip
    rows = columns_of(pa.Table.from_pylist([row()]))
    (code,) = codes_by_halves(np.array([2], np.int8), rows, groups)
    assert VERDICTS[code] == expected
    (none,) = codes_by_halves(np.array([-1], np.int8), rows, groups)
    assert none == -1, "where nothing was measured halves say nothing"


def test_ranks_of_each_order_are_those_of_flat_and_of_geometric_spectra():
    """A flat spectrum has its size at each order; for shares 1/2, 1/4, 1/8, 1/8 they are computed
    by hand."""
    frame = pd.DataFrame(
        {"run_id": "a", "eigenvalues": [np.full(7, 3.0), np.array([4.0, 2, 1, 1])]}
    )
    ranks = renyi_ranks(frame)
    assert "eigenvalues" not in ranks
    p = np.array([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    columns = ["rank_half", "rank_1", "rank_2", "rank_inf"]
    assert ranks.loc[0, columns].tolist() == pytest.approx([7, 7, 7, 7])
    by_hand = [np.sqrt(p).sum() ** 2, 2**1.75, 1 / (p**2).sum(), 2.0]
    assert ranks.loc[1, columns].tolist() == pytest.approx(by_hand)
    assert np.isnan(renyi_ranks(frame.assign(eigenvalues=[np.zeros(3)] * 2))[columns]).all(
        axis=None
    )
