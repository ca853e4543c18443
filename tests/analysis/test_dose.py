"""Dose and response on hand-made runs, and against least squares written out with dummy
variables."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from nerve.analysis.compare import average_seeds, final_metrics
from nerve.analysis.dose import dose_response
from nerve.errors import ConfigError

DOSE = "regularizer.weight"


def run(dose, seed, loss, pr, **more):
    """A run with one measured step and two layers whose mean PR is `pr`."""
    rows = [{"step": 10, "layer": layer, "val_loss": loss, "pr_post": pr} for layer in range(2)]
    config = {DOSE: dose, **more.pop("config", {})}
    return {"rows": rows, "seed": seed, "config": config, "run_id": f"d{dose}s{seed}"} | more


def line_of_runs():
    """log PR = 2 - dose + seed / 4 and loss = 3 + dose / 2 + seed, without error."""
    return [
        run(dose, seed, 3 + 0.5 * dose + seed, math.exp(2 - dose + seed / 4))
        for dose in (-0.5, 0.0, 1.0)
        for seed in (0, 1)
    ]


def test_an_exact_response_by_hand(tables):
    table = dose_response(*tables(*line_of_runs()), dose=DOSE, names=["pr_post"])
    assert table[DOSE].tolist() == [-0.5, 0, 1]
    assert table["n_seeds"].tolist() == [2, 2, 2]
    assert table["df"].tolist() == [2, 2, 2], "6 runs less 3 doses, 1 further seed"
    assert table["value"].tolist() == pytest.approx([2.625, 2.125, 1.125])
    assert table["change"].tolist() == pytest.approx([0.5, 0, -1])
    assert table["val_loss"].tolist() == pytest.approx([3.25, 3.5, 4.0])
    assert table["loss_change"].tolist() == pytest.approx([-0.25, 0, 0.5])
    assert table["slope"].tolist() == pytest.approx([-0.5] * 3)
    for name in ("slope", "change", "loss_change"):
        width = table[f"{name}_high"] - table[f"{name}_low"]
        assert width.tolist() == pytest.approx([0] * 3, abs=1e-6)
    assert table["predicted_slope"].isna().all()
    assert set(table["n_designs"]) == {0}


def test_seeds_are_paired(tables):
    """Seeds far apart, doses close together: without pairing, the interval would be wider than
    1."""
    noise = iter([0.01, -0.01, 0.02, -0.02, 0.01, 0.0])
    specs = [
        run(dose, seed, 3 + 0.1 * dose + 5 * seed + next(noise), 8.0, unigram_loss=99.0)
        for dose in (0, 1)
        for seed in range(3)
    ]
    table = dose_response(*tables(*specs), dose=DOSE, names=["pr_post"]).set_index(DOSE)
    losses = np.array([spec["rows"][0]["val_loss"] for spec in specs]).reshape(2, 3)
    paired = scipy.stats.ttest_rel(losses[1], losses[0]).confidence_interval(0.95)
    row = table.loc[1]
    assert row["df"] == 2
    assert (row["loss_change_low"], row["loss_change_high"]) == pytest.approx(tuple(paired))
    assert row["loss_change_high"] - row["loss_change_low"] < 0.2
    assert table["slope"].isna().all(), "the metric does not move"


def least_squares(design: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Coefficients, half intervals and degrees of freedom of a design of full rank."""
    free = len(values) - design.shape[1]
    inverse = np.linalg.inv(design.T @ design)
    fitted = inverse @ design.T @ values
    error = np.sum((values - design @ fitted) ** 2) / free
    return fitted, scipy.stats.t.ppf(0.975, free) * np.sqrt(error * np.diag(inverse)), free


def test_seeds_of_128_bits_are_paired_like_small_ones(tables):
    metrics, runs = tables(*line_of_runs())
    large = runs.assign(seed=runs["seed"].astype(object) + 2**100)
    tables_of = [dose_response(metrics, own, dose=DOSE) for own in (runs, large)]
    pd.testing.assert_frame_equal(*tables_of)


def test_intervals_are_those_of_least_squares_also_where_runs_are_missing(tables):
    """Two runs of a grid of 4 doses and 3 seeds are missing; the error is pooled over all doses."""
    rng = np.random.default_rng(0)
    doses, seeds = np.array([-1.0, 0.0, 2.0, 3.0]), np.arange(3)
    cells = [(d, s) for d in doses for s in seeds if (d, s) not in ((2.0, 1), (-1.0, 0))]
    logs, losses = rng.normal(size=10), rng.normal(size=10) + 4
    specs = [
        run(float(dose), int(seed), loss, math.exp(log))
        for (dose, seed), log, loss in zip(cells, logs, losses, strict=True)
    ]
    table = dose_response(*tables(*specs), dose=DOSE, names=["pr_post"]).set_index(DOSE)
    seed_columns = np.array([[s == other for other in seeds] for _, s in cells], float)
    dose_columns = np.array([[d == other for other in (-1, 2, 3)] for d, _ in cells], float)
    design = np.hstack([dose_columns, seed_columns])
    for name, values in (("loss_change", losses), ("change", logs)):
        fitted, half, free = least_squares(design, values)
        rows = table.loc[[-1, 2, 3]]
        assert rows[name].tolist() == pytest.approx(fitted[:3])
        assert (rows[f"{name}_high"] - rows[name]).tolist() == pytest.approx(half[:3])
        assert set(table["df"]) == {free} == {4}
    fitted, half, _ = least_squares(np.hstack([logs[:, None], seed_columns]), losses)
    assert table["slope"].tolist() == pytest.approx([fitted[0]] * 4)
    assert (table["slope_high"] - table["slope"]).tolist() == pytest.approx([half[0]] * 4)


def design(name, loss, pr, seed=0):
    return {
        "rows": [{"step": 10, "val_loss": loss, "pr_post": pr}],
        "seed": seed,
        "run_id": f"{name}{seed}",
        "config": {"activation.name": name},
    }


def test_the_prediction_from_designs_is_the_line_through_them(tables):
    """loss = 5 - .25 · log PR, with four designs of two seeds around it; designs with a dose are
    ignored."""
    others = [
        design(f"a{i}", 5 - 0.25 * log + bump + 0.1 * seed, math.exp(log), seed)
        for i, (log, bump) in enumerate([(1, 0.01), (2, -0.02), (3, 0.0), (4, 0.01)])
        for seed in (0, 1)
    ]
    metrics, runs = tables(*line_of_runs(), *others)
    designs = average_seeds(final_metrics(metrics, runs))
    assert len(designs) == 7
    dosed = runs[runs[DOSE].notna()]
    table = dose_response(metrics, dosed, dose=DOSE, names=["pr_post"], designs=designs)
    x, y = [1, 2, 3, 4], [5 - 0.25 * x + b + 0.05 for x, b in enumerate((0.01, -0.02, 0, 0.01), 1)]
    fit = scipy.stats.linregress(x, y)
    half = scipy.stats.t.ppf(0.975, 2) * fit.stderr
    assert set(table["n_designs"]) == {4}
    assert table["predicted_slope"].tolist() == pytest.approx([fit.slope] * 3)
    assert table["predicted_slope_low"].tolist() == pytest.approx([fit.slope - half] * 3)
    expected = fit.slope * np.array([0.5, 0, -1])
    assert table["predicted_loss_change"].tolist() == pytest.approx(expected.tolist())


def test_groups_are_separate_and_flagged_runs_left_out(tables):
    """The second design responds in the opposite way; one of its runs did not finish."""
    specs = []
    for sign, name in ((1, "gelu"), (-1, "relu")):
        for spec in line_of_runs():
            spec["config"]["activation.name"] = name
            spec["run_id"] += name
            for row in spec["rows"]:
                row["val_loss"] = 4 + sign * (row["val_loss"] - 4) / 2
            specs.append(spec)
    specs[-1]["run_status"] = "failed"
    table = dose_response(
        *tables(*specs), dose=DOSE, by=["activation.name"], names=["pr_post", "eee_post"]
    )
    log_pr = table[table["metric"] == "pr_post"].set_index(["activation.name", DOSE])
    assert log_pr.loc["gelu", "slope"].tolist() == pytest.approx([-0.25] * 3)
    assert log_pr.loc["relu", "slope"].tolist() == pytest.approx([0.25] * 3)
    assert log_pr.loc["gelu", "n_flagged"].tolist() == [0] * 3
    assert log_pr.loc["relu", "n_flagged"].tolist() == [1] * 3
    assert log_pr.loc["relu", "n_seeds"].tolist() == [2, 2, 1]
    assert (table[table["metric"] == "eee_post"]["value"] == 0.25).all(), "no logarithm of EEE"


def test_one_seed_has_changes_and_no_intervals(tables):
    specs = [run(dose, 0, 3 + dose, math.exp(dose)) for dose in (1, 2)]
    table = dose_response(*tables(*specs), dose=DOSE, names=["pr_post"])
    assert table["loss_change"].tolist() == pytest.approx([0, 1]), "the lowest is the reference"
    assert table["loss_change_low"].isna().all()
    assert table["slope"].tolist() == pytest.approx([1, 1])
    assert table["slope_low"].isna().all()


def test_doses_without_a_seed_in_common_are_not_compared(tables):
    specs = [run(0, 0, 3, 2), run(0, 1, 3.1, 2), run(1, 2, 4, 3), run(1, 3, 4.2, 3)]
    table = dose_response(*tables(*specs), dose=DOSE, names=["pr_post"]).set_index(DOSE)
    assert np.isnan(table.loc[1, "loss_change"])
    assert table.loc[1, "val_loss"] == pytest.approx(4.1)


def test_what_cannot_be_compared_is_refused_with_the_fix(tables):
    doubled = run(0, 0, 3, 2, run_id="again", config={"optimizer.lr": 1e-3})
    metrics, runs = tables(run(0, 0, 3, 2), doubled, run(1, 0, 4, 3))
    with pytest.raises(
        ConfigError, match=r"weight=0.* seed=0, such as .*Add the other columns that vary"
    ):
        dose_response(metrics, runs, dose=DOSE)
    with pytest.raises(ConfigError, match=r"reference must be one of the doses, 0.*, 1.*; got 2"):
        dose_response(metrics, runs, dose=DOSE, reference=2)
    with pytest.raises(ConfigError, match=f"{DOSE} has no value in these runs"):
        dose_response(metrics, runs.assign(**{DOSE: math.nan}), dose=DOSE)
    with pytest.raises(
        ConfigError, match=r"A dose must be a number; run_status has values such as"
    ):
        dose_response(metrics, runs.assign(run_status="x"), dose="run_status")
    with pytest.raises(ConfigError, match=r"rows of load_runs with the column ffn.widht"):
        dose_response(metrics, runs, dose="ffn.widht")


def test_runs_without_a_group_give_an_empty_frame_of_the_same_columns(tables):
    metrics, runs = tables(run(0, 0, 3, 2))
    full = dose_response(metrics, runs, dose=DOSE)
    none = dose_response(metrics, runs.assign(run_status="failed"), dose=DOSE)
    assert isinstance(none, pd.DataFrame)
    assert len(none) == 0
    assert list(none.columns) == list(full.columns)
