"""Early ranking against SciPy's Kendall, and its result if the loss so far says everything."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nerve.analysis import early
from nerve.analysis.early import BUDGET, Order, Samples, rank_early
from nerve.errors import ConfigError

N = 9
RNG = np.random.default_rng(0)
FINAL = RNG.permutation(N) / 10 + 2.0
SO_FAR = FINAL + RNG.normal(size=N) / 3 + 2.0
METRIC = RNG.normal(size=N) + 5.0


def specs(metric=METRIC, final=FINAL, **more):
    """`n` runs measured at steps 0, 10 and 20."""
    config = {"trainer.max_steps": 100, "optimizer.schedule.warmup": 0.1}
    return [
        {
            "rows": [
                {"step": step, "val_loss": loss, "pr_post": value}
                for step, loss in ((0, 7.0), (10, SO_FAR[i]), (20, final[i]))
            ],
            "config": config | {"ffn.width": i},
            **more,
        }
        for i, value in enumerate(metric)
    ]


def row_of(table, step, metric="pr_post"):
    (row,) = table[(table["step"] == step) & (table["metric"] == metric)].itertuples()
    return row


def tau(x, y):
    return stats.kendalltau(x, y).statistic


def test_one_step_is_scipys(tables):
    row = row_of(rank_early(*tables(*specs()), names=["pr_post"]), 10)
    mf, ml, lf = tau(METRIC, FINAL), tau(METRIC, SO_FAR), tau(SO_FAR, FINAL)
    assert (row.n, row.n_designs) == (N, N)
    assert (row.kendall, row.loss_kendall) == pytest.approx((mf, lf))
    assert row.given_loss == pytest.approx((mf - ml * lf) / np.sqrt((1 - ml**2) * (1 - lf**2)))
    for name in ("kendall", "loss_kendall", "given_loss"):
        low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
        assert low < getattr(row, name) < high
    assert row.schedule == "trainer.max_steps=100 optimizer.schedule.warmup=0.1"


def test_the_loss_ranks_perfectly_at_the_last_step_and_not_at_all_at_step_0(tables):
    table = rank_early(*tables(*specs()), names=["pr_post"])
    last = row_of(table, 20)
    assert last.loss_kendall == 1
    assert np.isnan(last.given_loss)
    assert np.isnan(row_of(table, 0).loss_kendall)  # all have the same


@pytest.mark.parametrize("name", BUDGET)
def test_runs_of_another_budget_are_another_group(tables, name):
    """Longer runs end lower and have a higher metric; within each budget there is no order."""

    def of_budget(budget, some, **more):
        return [each | {"config": each["config"] | {name: budget}, **more} for each in some]

    longer = of_budget(1000, specs(METRIC + 100, final=FINAL - 1.5), seed=99)
    metrics, runs = tables(*of_budget(100, specs()), *longer)
    table = rank_early(metrics, runs, names=["pr_post"])
    at_step = table[table["step"] == 10]
    assert list(at_step["n"]) == [N, N]
    assert list(at_step["kendall"]) == pytest.approx([tau(METRIC, FINAL)] * 2)
    pooled = tau(np.r_[METRIC, METRIC + 100], np.r_[FINAL, FINAL - 1.5])
    assert pooled < at_step["kendall"].min()


def test_factors_make_groups_and_flagged_runs_are_left_out(tables):
    some = specs()
    some[0] |= {"run_status": "failed"}
    for i, spec in enumerate(some):
        spec["config"] = spec["config"] | {"model.d_model": 64 if i < 5 else 128}
    metrics, runs = tables(*some)
    table = rank_early(metrics, runs, ["model.d_model"], names=["pr_post"])
    at_step = table[table["step"] == 10]
    assert list(at_step["model.d_model"]) == [64, 128]
    assert list(at_step["n"]) == [4, 4]
    assert at_step["kendall_low"].isna().all()
    assert np.isfinite(at_step["kendall"]).all()


def test_nothing_to_rank_gives_no_rows_and_names_are_checked(tables):
    metrics, runs = tables(*specs())
    assert len(rank_early(metrics[:0], runs)) == 0
    with pytest.raises(ConfigError, match=r"Similar names: .*pr_post"):
        rank_early(metrics, runs, names=["pr_pos"])


def test_a_value_that_is_drawn_twice_is_tied_with_itself():
    """Weighted samples against SciPy with repeated values; NaN if nothing varies."""
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 6, size=(2, 15)).astype(float)
    weights = rng.multinomial(15, np.ones(15) / 15, size=20).astype(float)
    samples = Samples(np.arange(15), weights)
    found = Order(x).kendall(Order(y), samples)
    repeated = [(np.repeat(x, w), np.repeat(y, w)) for w in weights.astype(int)]
    assert found == pytest.approx([tau(*pair) for pair in repeated])
    assert np.isnan(Order(np.ones(15)).kendall(Order(y), samples)).all()


@pytest.mark.parametrize("n_values", [6, 40])
def test_values_of_a_cluster_are_drawn_together(n_values):
    """Clusters of different sizes, with ties between values and without, against SciPy."""
    rng = np.random.default_rng(3)
    cluster = rng.permutation(np.repeat(np.arange(9), rng.integers(1, 5, size=9)))
    x = rng.integers(0, n_values, size=len(cluster)).astype(float)
    y = rng.normal(size=len(cluster))
    counts = rng.multinomial(9, np.ones(9) / 9, size=30).astype(float)
    found = Order(x).kendall(Order(y), Samples(cluster, counts))
    drawn = [np.repeat(np.arange(len(x)), each.astype(int)[cluster]) for each in counts]
    assert found == pytest.approx([tau(x[rows], y[rows]) for rows in drawn], rel=1e-12)


def test_infinite_losses_are_ranked_last_and_are_ties():
    """Two runs that started with an infinite loss and recovered, against SciPy on finite ranks."""
    so_far = np.array([np.inf, 3.0, 2.5, np.inf, 2.0, 4.0])
    final = np.array([2.0, 1.0, 3.0, 2.5, 1.5, 0.5])
    samples = Samples(np.arange(6), np.ones((1, 6)))
    (found,) = Order(so_far).kendall(Order(final), samples)
    assert found == pytest.approx(tau(np.minimum(so_far, 9.0), final))


def test_a_noisy_copy_of_the_loss_has_the_partial_tau_of_the_null(tables):
    """Metric and final loss are the loss so far plus independent noise: 300 runs."""
    rng = np.random.default_rng(2)
    loss, noise, other = rng.normal(size=(3, 300))
    frame = pd.DataFrame({"loss": 3 + loss / 10, "metric": np.exp(-(loss + noise))})
    frame["final"] = 2 + (loss + 0.5 * other) / 10
    metrics, runs = tables(*specs())
    first = metrics["run_id"].iloc[0]
    rows = metrics[(metrics["run_id"] == first) & (metrics["step"] > 0)]
    names = [f"r{i}" for i in range(300)]
    rows = pd.concat([rows] * 300).assign(run_id=np.repeat(names, 2))
    rows["val_loss"] = frame[["loss", "final"]].to_numpy().ravel()
    rows["pr_post"] = np.repeat(frame["metric"].to_numpy(), 2)
    own = pd.concat([runs[runs["run_id"] == first]] * 300).assign(
        run_id=names, design_id=names, config_id=names
    )
    row = row_of(rank_early(rows, own, names=["pr_post"]), 10)
    assert -0.2 < row.null < -0.05
    assert row.given_loss_low < row.null < row.given_loss_high < 0


def test_of_many_runs_whole_designs_are_ranked_whatever_their_order(tables, monkeypatch):
    """As many designs as fit into the limit of ranked runs."""
    monkeypatch.setattr(early, "MOST_RUNS", 6)
    metrics, runs = tables(*specs())
    table = rank_early(metrics, runs, names=["pr_post"])
    row = row_of(table, 10)
    assert (row.n, row.n_designs) == (6, 6)
    first = sorted(runs["design_id"])[:6]
    kept = runs["design_id"].isin(first).to_numpy()
    assert row.kendall == pytest.approx(tau(METRIC[kept], FINAL[kept]))
    shuffled = runs.sample(frac=1, random_state=0)
    assert row_of(rank_early(metrics, shuffled, names=["pr_post"]), 10).kendall == row.kendall
    one = runs.assign(design_id="one")  # of a single design, which does not fit either
    row = row_of(rank_early(metrics, one, names=["pr_post"]), 10)
    assert (row.n, row.n_designs) == (6, 1)
