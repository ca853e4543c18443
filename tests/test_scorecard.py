"""The study: its page says what its runs say, by rules that hold for hand-made cases."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import stats
from studied import RUNS, STUDY, judgements
from support import metrics_row

from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore

PAGE = STUDY / "findings.md"
FOUR = ["se_pre", "se_post", "pr_pre", "pr_post"]
COMPARED = {
    "PreLN GELU": {"normalization__kind": "layernorm", "activation__name": "gelu"},
    "norm-free ReLU": {
        "normalization__kind": "none",
        "activation__name": "relu",
        "optimizer__lr": 5e-4,
    },
}
"""The designs of claims 4 and 5."""


@pytest.fixture(scope="module")
def text() -> str:
    return PAGE.read_text("utf-8")


def rows_of(sweep: str, **where: Any) -> pd.DataFrame:
    """The rows of a sweep's runs below their unigram loss, read without nerve.

    Args:
        where: configuration values by dotted name with `__` for the dot; as columns they have dots.
    """
    wanted = {name.replace("__", "."): value for name, value in where.items()}
    frames = []
    for path in sorted(RUNS.glob(f"{sweep}/*/run.json")):
        record = json.loads(path.read_text())
        leaves = pd.json_normalize(record["config"]).iloc[0]
        if any(leaves[name] != value for name, value in wanted.items()):
            continue
        tables = [pq.read_table(part).to_pandas() for part in path.parent.glob("metrics/*.parquet")]
        frame = pd.concat(tables).sort_values(["step", "layer"])
        limit = record["unigram_loss"] or frame["val_loss"].iloc[0]
        if record["run_status"] == "done" and frame["val_loss"].iloc[-1] < limit:
            more = {name: leaves[name] for name in ("ffn.width", "optimizer.lr")}
            more["warm_steps"] = leaves["optimizer.schedule.warmup"] * leaves["trainer.max_steps"]
            more |= {"seed": record["seed"], "accuracy": record["final"].get("val_accuracy")}
            frames.append(frame.assign(**more))
    return pd.concat(frames)


def at_end(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["step"] == rows.groupby("run_id")["step"].transform("max")]


def block(text: str, name: str) -> str:
    return text.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]


def cells(block: str, *starts: str) -> list[str]:
    """The remaining cells of the row of a block whose first cells start with these texts."""
    found = []
    for line in block.splitlines():
        row = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(row) > len(starts) and all(map(str.startswith, row, starts)):
            found.append(row[len(starts) :])
    assert len(found) == 1, (starts, found)
    return found[0]


def says(text: str, values: Sequence[float]) -> bool:
    """Whether a text contains exactly these numbers, each rounded to the displayed digits.

    One number stands for all, as the mean of seeds that agree in the displayed digits.
    """
    shown = re.findall(r"-?\d[\d,]*\.?\d*", text)
    shown = shown * len(values) if len(shown) == 1 else shown
    digits = [len(number.partition(".")[2]) for number in shown]
    return len(shown) == len(values) and all(
        abs(float(number.replace(",", "")) - value) <= 0.5 * 10**-places + 1e-9
        for number, places, value in zip(shown, digits, values, strict=True)
    )


def mean_and_range(values: Sequence[float]) -> list[float]:
    return [float(np.mean(values)), min(values), max(values)]


def test_the_page_agrees_with_its_runs(scorecard, evidence, judged, text):
    """Nothing changes when the blocks are recomputed from the committed runs."""
    assert scorecard.page.fill(text, scorecard.page.blocks(evidence, judged)) == text


def test_the_first_line_of_a_claim_says_its_verdict_why_and_which_null_passes(scorecard):
    """For hand-made checks: holds, opposite, without runs, and passing a null model."""
    checks = {check.id: check for check in scorecard.criteria.CHECKS}
    Judged, Estimate = scorecard.criteria.check.Judged, scorecard.criteria.check.Estimate
    no_runs = Judged(checks["15.stall"], None, None, None, None, lambda _: iter(()))
    holds = Estimate(0.5, 0.25, 0.75, sd=0.1, df=4, n_seeds=6, n_runs=6)
    opposite = Estimate(-0.5, -0.75, -0.25, sd=0.1, df=4, n_seeds=6, n_runs=6)

    def judged(estimate, permuted):
        return Judged(checks["15.stall"], "made", None, estimate, None, lambda _: iter(permuted))

    line = scorecard.verdicts.first_line
    assert line([judged(holds, [opposite])]).startswith("**✓ Holds** because `15.stall` holds")
    assert line([judged(opposite, [])]).startswith("**✗ Does not hold** because `15.stall` is opp")
    assert line([no_runs]).startswith("**? Cannot be told here** because `15.stall` has no runs")
    passes = line([judged(holds, [dataclasses.replace(holds, effect=0.6)])])
    assert passes.startswith("**? Cannot be told here**")
    assert "runs with permuted labels would also pass one of its checks" in passes


def test_the_scorecard_has_a_verdict_and_a_number_of_each_claim(scorecard, judged, text):
    """The first screen: at most eight words per claim, and the effect of its first check."""
    rows = [row for row in block(text, "scorecard").splitlines() if row.startswith("| [")]
    assert len(rows) == len(scorecard.claims.CLAIMS)
    for claim, row in zip(scorecard.claims.CLAIMS, rows, strict=True):
        _, short, symbol, ours, *_ = (cell.strip() for cell in row.strip("|").split(" | "))
        assert short == claim.short
        assert len(short.split()) <= 8
        own = [each for each in judged if each.check.claim == claim.number]
        assert symbol == scorecard.verdicts.SYMBOLS[scorecard.verdicts.outcome(own)]
        if own[0].estimate is not None:
            expected = [own[0].estimate.effect, own[0].estimate.low, own[0].estimate.high]
            if own[0].estimate.df == 0:  # one seed has no interval
                assert ours.endswith(" [–, –]")
                expected = expected[:1]
            assert [float(n.replace(",", "")) for n in re.findall(r"-?[\d.,]*\d", ours)] == (
                pytest.approx(expected, rel=0.05, abs=0.005)
            )


def test_the_list_of_runs_has_each_with_its_speed_and_the_share_of_measuring(scorecard, evidence):
    page = (STUDY / "runs.md").read_text("utf-8")
    assert page == scorecard.page.each_run(evidence)
    paths = sorted(RUNS.glob("*/*/run.json"))
    assert page.count("\n| ") == len(paths) + 2
    for path in paths[::20]:
        record = json.loads(path.read_text())
        parts = [pq.read_table(part).to_pandas() for part in path.parent.glob("metrics/*.parquet")]
        final = record["final"] or {}
        tokens = pd.concat(parts)["tokens_seen"].max() if parts else 0
        shown = cells(page, path.parent.parent.name, path.parent.name)
        if "train_seconds" in final:
            assert float(shown[4].replace(",", "")) == pytest.approx(
                tokens / final["train_seconds"], rel=0.005
            )
            share = 100 * final["measuring_seconds"] / final["train_seconds"]
            assert float(shown[5].strip("%")) == pytest.approx(share, rel=0.05)


def test_every_claim_has_its_section_and_its_figure(scorecard, text):
    headings = [line[3:] for line in text.splitlines() if re.match(r"## Claim \d", line)]
    assert headings == [scorecard.page.heading(claim) for claim in scorecard.claims.CLAIMS]
    links = re.findall(r"\((figures/[^)]*)\)", text)
    assert links
    assert all((STUDY / link).is_file() for link in links)


@pytest.mark.parametrize(("name", "activation"), [("GELU", "gelu"), ("ReLU", "relu")])
def test_claim_1_has_the_means_over_layers_and_seeds(text, name, activation):
    rows = at_end(
        rows_of("activation_gpu", activation__name=activation, model__d_model=512)
    ).groupby("layer")
    shown = cells(block(text, "claim 1"), name, "d_model 512")
    for cell, metric in zip(shown, ("se", "pr", "eee"), strict=True):
        pre, post = (rows[f"{metric}_{site}"].mean().to_numpy() for site in ("pre", "post"))
        expected = [pre.mean(), pre.std(ddof=1), post.mean(), post.std(ddof=1)]
        assert says(cell.replace(" → ", " ; "), expected), (cell, expected)


def test_claim_2_has_the_losses_of_both_activations(text):
    expected = []
    for activation in ("gelu", "relu"):
        rows = at_end(rows_of("activation_gpu", activation__name=activation, model__d_model=512))
        losses = rows.groupby("seed")["val_loss"].first()
        assert len(losses) == 3
        expected += mean_and_range(losses)
    assert says(cells(block(text, "claim 2"), "loss: GELU < ReLU")[1], expected)


@pytest.mark.parametrize("metric", FOUR)
@pytest.mark.parametrize("design", COMPARED)
def test_claim_4_has_the_correlations_within_runs_in_three_windows(text, metric, design):
    windows: dict[str, list[float]] = {"all": [], "late": [], "changes": []}
    for _, run in rows_of("ffn_width_gpu", **COMPARED[design]).groupby("run_id"):
        points = run.groupby("step")[[metric, "val_loss"]].mean()
        late = points[points.index >= run["warm_steps"].iloc[0]]
        for name, series in (("all", points), ("late", late), ("changes", late.diff().dropna())):
            windows[name].append(np.corrcoef(series[metric], series["val_loss"])[0, 1])
    short = f"{metric[:2].upper()}_{metric[3:]}"
    shown = cells(block(text, "claim 4"), design, short)
    for cell, values in zip(shown, windows.values(), strict=True):
        expected = [float(np.median(values)), min(values), max(values)]
        assert says(cell, expected), (cell, expected)


@pytest.mark.parametrize("metric", FOUR)
@pytest.mark.parametrize("design", COMPARED)
def test_claim_5_has_the_correlations_across_widths_with_their_intervals(text, metric, design):
    rows = at_end(rows_of("ffn_width_gpu", **COMPARED[design]))
    points = rows.groupby("ffn.width")[[metric, "val_loss"]].mean()
    r = np.corrcoef(points[metric], points["val_loss"])[0, 1]
    half = 1.959963984540054 / math.sqrt(len(points) - 3)
    expected = [r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)]
    short = f"{metric[:2].upper()}_{metric[3:]}"
    rate = f"{rows['optimizer.lr'].iloc[0]:g}"
    shown = cells(block(text, "claim 5"), design, rate, short)
    assert says(shown[0], expected)
    assert says(shown[1], [points.corr("spearman").iloc[0, 1]])
    assert shown[2] == "8"
    checked = [row for row in block(text, "claim 5").splitlines() if f"{design}: r of " in row]
    assert all(shown[0] in row for row in checked if short in row)


@pytest.mark.parametrize("constraint", ["spectral_norm", "weight_norm", "hyperspherical", "none"])
def test_claim_8_has_the_loss_and_the_flatness_of_each_constraint(text, constraint):
    sweep = "normfree_gpu" if constraint == "none" else "ffn_constraint_gpu"
    norm_free = {"normalization__kind": "none", "activation__name": "gelu"}
    seeds = at_end(rows_of(sweep, ffn__constraint=constraint, **norm_free)).groupby("seed")
    losses, flatness = seeds["val_loss"].first(), seeds["eee_post"].mean()
    shown = cells(block(text, "claim 8"), constraint.replace("_", " "), "")
    loss = cells(block(text, "claim 8"), constraint.replace("_", " "))[0]
    assert says(loss, mean_and_range(losses))
    assert says(shown[0], mean_and_range(flatness))
    assert shown[-1] == "3"


@pytest.mark.parametrize(
    ("place", "name"), [("pre", "PreLN"), ("mix", "MixLN"), ("post", "PostLN")]
)
def test_claim_9_has_the_exponents_of_the_widths(text, place, name):
    setting = {"optimizer__lr": 5e-4, "optimizer__schedule__warmup": 0.2}
    rows = at_end(rows_of("norm_placement_gpu", normalization__placement=place, **setting))
    means = rows.groupby(["ffn.width", "seed"])["pr_post"].mean()
    logs = np.log(means).groupby("ffn.width").mean()
    assert list(logs.index) == [1, 2, 4, 8]
    fit = stats.linregress(np.log(logs.index), logs)
    half = stats.t.ppf(0.975, 2) * fit.stderr
    expected = [fit.slope, fit.slope - half, fit.slope + half]
    measured = cells(block(text, "claim 9"), "exponent of PR_post over d_ff")[1]
    (own,) = [part for part in re.split(r", (?=[A-Z])", measured) if part.startswith(name)]
    assert says(own, expected)
    assert says(
        cells(block(text, "claim 9"), name, "8", "0.0005", "0.2", "0")[1], [means[8].iloc[0]]
    )


def test_claim_10_has_the_middle_and_the_last_third_of_twelve_layers(text):
    rows = at_end(rows_of("position_gpu", position__name="rope"))
    shown = cells(block(text, "claim 10"), "RoPE")
    for cell, layers in ((shown[2], range(4, 8)), (shown[3], range(8, 12))):
        seeds = rows[rows["layer"].isin(layers)].groupby("seed")["pr_post"].mean()
        assert says(cell, mean_and_range(seeds)), cell


@pytest.mark.parametrize(
    ("sweep", "name", "title"),
    [("optimizer_gpu", "muon", "At the best rate"), ("optimizer", "adafactor", "6 × 128")],
)
def test_claim_11_takes_the_rate_with_the_lowest_loss_at_seed_0(text, sweep, name, title):
    rows = at_end(rows_of(sweep, optimizer__name=name))
    first = rows[rows["seed"] == 0]
    rate = first.loc[first["val_loss"] == first["val_loss"].min(), "optimizer.lr"].iloc[0]
    best = rows[rows["optimizer.lr"] == rate]
    gains = (best["pr_post"] / best["pr_pre"]).groupby(best["seed"]).max()
    table = block(text, "claim 11").partition(f"\n{title}")[2].partition("|\n\n")[0]
    shown = cells(table, name.capitalize(), f"{rate:g}")
    losses = best.groupby("seed")["val_loss"].first()
    assert says(shown[0], mean_and_range(np.exp(losses)))
    assert says(shown[1], mean_and_range(gains))


def test_claim_13_has_the_accuracies_of_its_cells(text):
    rows = rows_of(
        "mixer_activation",
        model__token_mixing__activation="relu",
        model__channel_mixing__activation="gelu",
    )
    accuracies = 100 * rows.groupby("seed")["accuracy"].first()
    assert says(cells(block(text, "claim 13"), "ReLU", "GELU")[1], mean_and_range(accuracies))


@pytest.mark.parametrize(
    ("greater", "less", "expected"),
    [
        ([4.0, 5.0, 6.0], [1.0, 2.0, 3.0], "yes"),
        ([4.0, 5.0, 6.0], [1.0, 2.0, 4.0], "no"),  # a tie is no difference
        ([2.0, 5.0, 6.0], [1.0, 2.5, 3.0], "no"),  # the means differ, the ranges overlap
        ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], "no"),
        ([4.0, 5.0], [1.0, 2.0, 3.0], "yes"),
        ([9.0], [1.0, 2.0, 3.0], "one seed"),
        ([1.0], [9.0], "one seed"),
        ([], [1.0, 2.0, 3.0], "not run"),
        ([1.0], [], "not run"),
    ],
)
def test_beyond_seed_noise_means_that_ranges_do_not_overlap(scorecard, greater, less, expected):
    assert scorecard.judgement.beyond_noise(greater, less) == expected


def test_the_effect_of_a_factor_and_its_standard_error(scorecard):
    """Cells 1 ± 1, 3 ± 1, 5 ± 1, 9 ± 1 with two seeds each: s² = 2, error √2/2 · √(4/2) = 1."""
    mixer = sys.modules["claims.mixer"]
    means = {("gelu", "gelu"): 1, ("relu", "gelu"): 3, ("gelu", "relu"): 5, ("relu", "relu"): 9}
    cells = {cell: np.array([mean - 1.0, mean + 1.0]) for cell, mean in means.items()}
    assert mixer.effect(cells, 0) == pytest.approx(((1 + 5) / 2 - (3 + 9) / 2, 1.0))
    assert mixer.effect(cells, 1) == pytest.approx(((1 + 3) / 2 - (5 + 9) / 2, 1.0))


def test_one_seed_of_one_design_leaves_a_check_of_several_undecided(scorecard):
    """However many seeds the other designs have."""
    cells = {(a, b): [1.0, 1.1, 1.2] for a in ("gelu", "relu") for b in ("gelu", "relu")}
    cells["gelu", "gelu"] = [9.0, 9.1]
    mixer, normfree = sys.modules["claims.mixer"], sys.modules["claims.normfree"]
    gelu, relu, leaky = normfree._names("norm-free")
    losses = {gelu: [3.0, 3.1], relu: [1.0, 1.1, 1.2], leaky: [2.0, 2.1]}

    def outcomes() -> list[str]:
        sweep = SimpleNamespace(final=lambda metric, level: np.array(losses[level]))
        effect = mixer._larger_effect("PR", "", cells)
        return [effect.holds, normfree._both_below(sweep).holds]

    assert outcomes() == ["no", "yes"]  # both factors have the same effect
    cells["gelu", "gelu"], losses[leaky] = [9.0], [2.0]
    assert outcomes() == ["one seed", "one seed"]
    cells["gelu", "gelu"], losses[leaky] = [], []
    assert outcomes() == ["not run", "not run"]


def test_a_series_has_settled_when_it_never_again_leaves_a_tenth_around_its_end(scorecard):
    """20, 95, 80, 105, 100: it is near at 95, leaves again at 80, and has settled at 105."""
    settling_steps = sys.modules["claims.nonlinearity"].settling_steps
    curve = {"step": range(0, 50, 10), "pr_post": [20.0, 95.0, 80.0, 105.0, 100.0]}
    sweep = SimpleNamespace(curves=pd.DataFrame({**curve, "level": "gelu", "seed": 0}))
    assert settling_steps(sweep, "gelu") == [30.0]


def test_time_at_work_counts_runs_side_by_side_once_and_pauses_not_at_all(scorecard):
    times = pd.to_datetime(["2026-01-01T00:00:00Z"] * 4)
    started = pd.Series(times + pd.to_timedelta([0, 10, 20, 100], unit="s"))
    ended = pd.Series(times + pd.to_timedelta([50, 30, 60, 110], unit="s"))
    assert scorecard.page.seconds_at_work(started, ended) == 60 + 10


def make_run(root: Path, activation: str, seed: int, loss: float, pr_post: float) -> str:
    """A run with two layers and steps in a sweep `activation_gpu`; returns its id."""
    config = {
        "activation": {"name": activation},
        "model": {"n_layers": 2, "d_model": 512},
        "monitor": {"every_n_steps": 10},
        "seed": seed,
    }
    directory = root / "activation_gpu" / f"{activation}{seed}"
    record = RunRecord.create(
        directory, config, sweep="activation_gpu", seed=seed, n_parameters=10, unigram_loss=6.0
    )
    record.step = 10
    store = RunStore(directory, record.run_id)
    store.append_metrics(
        metrics_row(step, layer, pr_post=pr_post, val_loss=loss if step else 7.0)
        for step in (0, 10)
        for layer in range(2)
    )
    store.flush(10)
    record.finish("done", None, final={"train_seconds": 10.0, "measuring_seconds": 1.0})
    return record.run_id


def test_a_run_at_the_unigram_loss_is_named_and_in_no_mean(scorecard, tmp_path, monkeypatch):
    """PR_post 5 and 7 for two seeds; the third, with 1000, never got below the loss of 6."""
    monkeypatch.setattr("nerve.storage.record.git_commit", lambda: None)
    monkeypatch.setattr("nerve.storage.record.package_versions", dict)
    for seed, (loss, pr_post) in enumerate([(3.0, 5.0), (3.1, 7.0), (6.5, 1000.0)]):
        make_run(tmp_path, "gelu", seed, loss, pr_post)
    evidence = scorecard.evidence.Evidence(tmp_path)
    contents = scorecard.page.blocks(evidence, judgements(scorecard, evidence))
    assert cells(contents["claim 2"], "GELU", "512")[1] == "6.00 (5.00 to 7.00)"
    assert "1,000" not in contents["claim 2"]
    assert cells(contents["runs"], "activation_gpu")[:2] == ["3", "1"]
    named = [line for line in contents["runs"].splitlines() if line.startswith("- ")]
    assert len(named) == 1
    assert "seed 2: untrained. Its lowest validation loss, 6.5, is not below" in named[0]
    # ReLU is not there, and neither are the other sweeps.
    assert cells(contents["claim 2"], "PR_post, mean over layers")[-1] == "not run"
    assert contents["claim 4"] == "Not run."
    assert contents["verdict 4"].startswith("**? Cannot be told here**")


def test_only_the_text_between_marks_is_replaced(scorecard):
    fill = scorecard.page.fill
    page = "before\n<!-- a -->\nold\n<!-- end -->\nbetween\n<!-- b -->\n<!-- end -->\nafter\n"
    filled = fill(page, {"a": "new", "b": "\\1"})
    assert filled == (
        "before\n<!-- a -->\n\nnew\n\n<!-- end -->\n"
        "between\n<!-- b -->\n\n\\1\n\n<!-- end -->\nafter\n"
    )
    assert fill(filled, {"a": "new", "b": "\\1"}) == filled


@pytest.mark.parametrize(
    "page",
    [
        "no marks\n",
        "<!-- a -->\nits end is missing\n<!-- b -->\n<!-- end -->\n",
        "<!-- a -->\n<!-- end -->\n<!-- a -->\n<!-- end -->\n",
    ],
)
def test_a_page_without_the_marks_of_a_block_is_refused(scorecard, page):
    with pytest.raises(ValueError, match=r"needs the marks <!-- a --> and <!-- end --> once"):
        scorecard.page.fill(page, {"a": "new"})
