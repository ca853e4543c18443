"""Rows whose spectrum may be dominated by a few samples: by a proof, each such row is flagged."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from nerve.derived import (
    LARGEST_MOVES,
    VERDICTS,
    describe_outliers,
    largest_move,
    outliers,
    sampling_codes,
)
from nerve.spectra import (
    SampleShares,
    Shares,
    StreamingCovariance,
    eigenvalues,
    participation_ratio,
)


def ratio_of(x: torch.Tensor) -> float:
    covariance = StreamingCovariance(x.shape[-1])
    covariance.update(x)
    return float(participation_ratio(eigenvalues(covariance.covariance())))


def row_of(pre: torch.Tensor, post: torch.Tensor) -> pd.DataFrame:
    row: dict[str, Any] = {"ffn": "ffn", "n_samples": pre.shape[:-1].numel()}
    for site, x in (("pre", pre), ("post", post)):
        found = SampleShares(x.shape[-1])
        found.update(x)
        shares = Shares(*found.shares().tolist())
        row[f"largest_share_{site}"], row[f"top_share_{site}"] = shares.largest, shares.top
        row[f"position_ratio_{site}"] = shares.position
        row[f"pr_{site}"] = ratio_of(x)
    return pd.DataFrame([row])


def test_the_bound_holds_for_any_sample_and_is_nearly_reached():
    """Random spectra, and a sample of any size in any direction: PR moves by at most the bound,
    with covariances in float64 and the exact share of the sample."""
    generator = torch.Generator().manual_seed(0)
    tightest = np.inf
    for case in range(400):
        dim, n = int(torch.randint(2, 60, (), generator=generator)), 500
        spread = torch.logspace(0, -(case % 4), dim, dtype=torch.float64)
        x = torch.randn(n, dim, generator=generator, dtype=torch.float64) * spread
        size = 10 ** (4 * torch.rand((), generator=generator) - 1)
        direction = torch.eye(dim, dtype=torch.float64)[0] if case % 2 else x[1] / x[1].norm()
        x[0] = size * x.norm(dim=1).median() * direction
        centered = x - x.mean(0)
        # Of a covariance's trace, the sample that is taken out has n/(n-1) times its share.
        share = float(centered[0].square().sum() / centered.square().sum()) * n / (n - 1)
        with_it, without = ratio_of(x), ratio_of(x[1:])
        bound = float(largest_move(share, with_it))
        moved = max(with_it / without, without / with_it) - 1
        assert moved <= bound * (1 + 1e-9)
        tightest = min(tightest, bound / moved)
    assert tightest < 1.2


def test_closed_forms():
    assert largest_move(0, 50) == 0
    assert largest_move(0.5, 4) == np.inf  # half of the variance can have been all of 1/PR
    assert largest_move(0.1, 1) == pytest.approx(0.9**-2 - 1)
    assert np.isnan(largest_move(np.nan, 5))
    assert np.isnan(largest_move(0.1, np.nan))


@pytest.mark.parametrize("site", ["pre", "post"])
@pytest.mark.parametrize("factor", [3, 5, 10, 30, 100, 300, 1000])
@pytest.mark.parametrize("position", [0, 700])
def test_a_planted_sample_that_moves_pr_is_flagged_at_its_site(site, factor, position):
    generator = torch.Generator().manual_seed(factor)
    spread = torch.logspace(0, -1, 48)
    clean = {each: torch.randn(1024, 48, generator=generator) * spread for each in ("pre", "post")}
    planted = {each: x.clone() for each, x in clean.items()}
    x = planted[site]
    direction = torch.randn(48, generator=generator)
    x[position] = factor * x.norm(dim=1).median() * direction / direction.norm()
    moved = abs(ratio_of(x) / ratio_of(clean[site]) - 1) > LARGEST_MOVES
    (named,) = outliers(row_of(**planted))
    assert named in (("", site) if not moved else (site,))
    assert not moved or factor >= 5
    assert outliers(row_of(**clean)).tolist() == [""]


@pytest.mark.parametrize("seq_len", [128, 512])
@pytest.mark.parametrize("position", [0, 77])
@pytest.mark.parametrize("factor", [3, 5, 10, 300])
def test_a_token_of_every_sequence_is_flagged(seq_len, position, factor):
    """As in trained models, where first tokens are one large vector."""
    x = torch.randn(16, seq_len, 64, generator=torch.Generator().manual_seed(0))
    x[:, position] = factor * x.norm(dim=-1).median() / 8
    row = row_of(x, torch.randn(16, seq_len, 64))
    assert outliers(row).tolist() == ["pre"]


def test_a_distant_channel_is_not_an_outlier():
    """The channels of token mixing take the place of tokens in a sequence."""
    x = torch.randn(128, 64, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 2.5
    row = row_of(x, torch.randn(128, 64, 64))
    assert outliers(row).tolist() == ["pre"]
    assert outliers(row.assign(ffn="token_mixing")).tolist() == [""]


def test_a_flag_is_described_with_its_numbers():
    x = torch.randn(3072, 64, generator=torch.Generator().manual_seed(0))
    x[::256] = 300.0
    row = row_of(x, torch.randn(3072, 64))
    assert ratio_of(x) < 1.01
    assert describe_outliers(row.iloc[0].to_dict(), "pre") == (
        "the farthest sample holds 8.3% of the variance, the farthest 0.1% of the samples hold "
        "33.1%"
    )
    x = torch.ones(12, 200, 8) + torch.randn(12, 200, 8) / 100
    x[:, 0] = torch.linspace(30, 40, 8)
    row = row_of(x, x).iloc[0].to_dict()
    of_all = (
        "the farthest sample holds 8.3% of the variance, the farthest 0.1% of the samples hold "
        "24.9%"
    )
    of_positions = ", those at one position have 199.0 times the mean squared distance"
    assert describe_outliers(row, "post") == of_all + of_positions
    assert describe_outliers(row | {"ffn": "token_mixing"}, "post") == of_all


def test_rows_without_shares_are_not_flagged():
    rows = row_of(torch.randn(50, 4), torch.randn(50, 4))
    stored_before = rows.assign(
        **{name: np.nan for name in rows if "share" in name or "ratio" in name}
    )
    assert outliers(stored_before).tolist() == [""]
    assert outliers(rows.iloc[:0]).empty


def test_verdicts_depend_on_the_samples_per_feature():
    """N/D from 8 is well, from 2 under, and below severely under."""
    n = np.array([800, 799, 200, 199, 800])
    columns = {"n_samples": n, "d_ff": np.full(5, 100)}
    codes = sampling_codes(columns, np.array([True, True, True, True, False]))
    assert codes.tolist() == [0, 1, 1, 2, -1]
    assert VERDICTS == ("well", "under", "severely under")
