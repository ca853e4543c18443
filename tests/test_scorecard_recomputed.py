"""Every core check of the study computed a second time, from run.json and the Parquet files with
pandas and textbook formulas for intervals, without nerve and study/scorecard.

The meaning of each check is implemented again here, following study/criteria.md. From the code
under test, these tests only use its results and the folders of runs that it chose.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import stats
from studied import STUDY

Found = tuple[float, float, float]
"""An effect and its 95% interval."""


@pytest.fixture(scope="module")
def of_ids(scorecard: SimpleNamespace, judged: Sequence[Any]) -> dict[str, Any]:
    """The results of study/scorecard for the paper's checks, by id."""
    checks = scorecard.criteria.CHECKS
    return {check.id: each for check, each in zip(checks, judged, strict=False)}


@cache
def runs_of(source: str) -> Sequence[SimpleNamespace]:
    """The runs of a folder that are done and end below their unigram loss.

    Each has `config` (leaves by dotted name), `record`, `steps`, `loss` (step,), and every metric
    as (step, FFN), token mixing before channel mixing.
    """
    found = []
    for path in sorted((STUDY / "runs" / source).glob("*/run.json")):
        record = json.loads(path.read_text())
        parts = [pq.read_table(part).to_pandas() for part in path.parent.glob("metrics/*.parquet")]
        if record["run_status"] != "done" or not parts:
            continue
        rows = pd.concat(parts).drop_duplicates(["step", "layer", "ffn"])
        order = rows["ffn"].map({"ffn": 0, "token_mixing": 0, "channel_mixing": 1})
        rows = rows.assign(order=order).sort_values(["step", "order", "layer"])
        loss = rows.groupby("step")["val_loss"].first()
        if loss.iloc[-1] >= (record["unigram_loss"] or loss.iloc[0]):
            continue
        metrics = {
            name: np.stack([own.to_numpy(float) for _, own in rows.groupby("step")[name]])
            for name in ("se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js")
        }
        config = pd.json_normalize(record["config"]).iloc[0].to_dict()
        found.append(
            SimpleNamespace(
                record=record,
                config=config,
                seed=record["seed"],
                steps=loss.index.to_numpy(float),
                loss=loss.to_numpy(float),
                **metrics,
            )
        )
    return found


def named(runs: Sequence[SimpleNamespace], designs: Mapping[str, Mapping[str, Any]]) -> list:
    """The runs of these designs, each with its `design`."""
    kept = []
    for run in runs:
        for name, values in designs.items():
            if all(run.config.get(key) == value for key, value in values.items()):
                kept.append(SimpleNamespace(**vars(run) | {"design": name}))
    return kept


def widest(runs: Sequence[SimpleNamespace]) -> list[SimpleNamespace]:
    largest = max(run.config["model.d_model"] for run in runs)
    return [run for run in runs if run.config["model.d_model"] == largest]


# Intervals


def of_difference(
    runs: Sequence[SimpleNamespace], values: Sequence[float], a: str, b: str
) -> Found:
    """a minus b in values = intercept + design + seed + error, with treatment coding relative to
    b."""
    names = sorted({run.design for run in runs} - {b})
    seeds = sorted({run.seed for run in runs})[1:]
    columns = [np.ones(len(runs))]
    columns += [np.array([run.design == name for run in runs], float) for name in names]
    columns += [np.array([run.seed == seed for run in runs], float) for seed in seeds]
    x, y = np.stack(columns, axis=1), np.asarray(values, float)
    beta, _square, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    place = 1 + names.index(a)
    df = len(y) - rank
    if df == 0:  # a seed of each design: nothing tells what the noise is
        return float(beta[place]), math.nan, math.nan
    variance = float(((y - x @ beta) ** 2).sum()) / df * np.linalg.inv(x.T @ x)[place, place]
    return around(beta[place], variance, df)


def of_mean(runs: Sequence[SimpleNamespace], values: Sequence[float], *designs: str) -> Found:
    """The mean over designs of their means; the variance within designs is pooled over all."""
    groups = {
        name: np.array([v for run, v in zip(runs, values, strict=True) if run.design == name])
        for name in {run.design for run in runs}
    }
    df = sum(len(own) - 1 for own in groups.values())
    within = sum(float(((own - own.mean()) ** 2).sum()) for own in groups.values()) / df
    variance = sum(within / len(groups[name]) for name in designs) / len(designs) ** 2
    return around(float(np.mean([groups[name].mean() for name in designs])), variance, df)


def of_slopes(runs: Sequence[SimpleNamespace], values: Sequence[float], a: str, b: str) -> Found:
    """The slope over log width of a minus that of b, with separate lines and pooled residuals."""
    slopes, residuals, spreads, df = [], 0.0, 0.0, 0
    for name in (a, b):
        own = [(run, v) for run, v in zip(runs, values, strict=True) if run.design == name]
        line = stats.linregress(
            [np.log(run.config["ffn.width"]) for run, _ in own], [v for _, v in own]
        )
        x = np.log([run.config["ffn.width"] for run, _ in own])
        residuals += float(
            ((np.array([v for _, v in own]) - line.intercept - line.slope * x) ** 2).sum()
        )
        spreads += 1 / float(((x - x.mean()) ** 2).sum())
        slopes.append(line.slope)
        df += len(own) - 2
    return around(slopes[0] - slopes[1], residuals / df * spreads, df)


def of_correlation(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None) -> Found:
    """r of the residuals of two linear fits on `given`, with Fisher's z."""
    if given is not None:
        x, y = (v - np.polyval(np.polyfit(given, v, 1), given) for v in (x, y))
    r = float(stats.pearsonr(x, y).statistic)
    half = stats.norm.ppf(0.975) / np.sqrt(len(x) - 3 - (given is not None))
    return r, float(np.tanh(np.arctanh(r) - half)), float(np.tanh(np.arctanh(r) + half))


def around(effect: float, variance: float, df: int) -> Found:
    half = stats.t.ppf(0.975, df) * np.sqrt(variance)
    return float(effect), float(effect - half), float(effect + half)


def lowest(*found: Found) -> Found:
    without_interval = [each for each in found if math.isnan(each[1])]
    return min(without_interval) if without_interval else min(found, key=lambda each: each[1])


# What a run comes to


def log_gain(run: SimpleNamespace) -> np.ndarray:
    """Log ratio of means over layers, (step,)."""
    return np.log(run.pr_post.mean(axis=1) / run.pr_pre.mean(axis=1))


def end_less_start(series: np.ndarray) -> float:
    return float(series[-1] - series[0])


def eee_fall(run: SimpleNamespace) -> float:
    return end_less_start((run.eee_pre - run.eee_post).mean(axis=1))


def end_pr_post(run: SimpleNamespace, layers: slice = slice(None)) -> float:
    return float(np.log(run.pr_post[-1, layers].mean()))


def early_gain(run: SimpleNamespace) -> float:
    """Layers 0 to 6 of 12: the mean of log gains, end minus start."""
    return end_less_start(np.log(run.pr_post / run.pr_pre)[:, :7].mean(axis=1))


def first_gain(run: SimpleNamespace) -> float:
    """Layers 0 to 3 of 12: the largest log gain, end minus start."""
    return end_less_start(np.log(run.pr_post / run.pr_pre)[:, :4].max(axis=1))


def band(run: SimpleNamespace) -> float:
    """Layers 2 to 4 of 12 against layer 0 and the last six."""
    js = run.js[-1]
    return float(js[2:5].min() - max(js[0], js[6:].max()))


def tracking(metric: str) -> Callable[[SimpleNamespace], float]:
    """-r of metric and loss given log(step + 1), after warm-up."""

    def value(run: SimpleNamespace) -> float:
        warm = run.config["optimizer.schedule.warmup"] * run.config["trainer.max_steps"]
        late = run.steps > warm
        clock = np.log(run.steps[late] + 1)
        return -of_correlation(getattr(run, metric).mean(axis=1)[late], run.loss[late], clock)[0]

    return value


def measuring_s(run: SimpleNamespace) -> float:
    """The seconds of one measurement."""
    return float(run.record["final"]["measuring_seconds"]) / len(run.steps)


def step_s(run: SimpleNamespace) -> float:
    final = run.record["final"]
    return float(final["train_seconds"] - final["measuring_seconds"]) / run.steps[-1]


def at_loss(run: SimpleNamespace, series: np.ndarray, level: float) -> float:
    """The value of a series where the loss last crosses a level on its way down."""
    for i in range(len(run.loss) - 2, -1, -1):
        if run.loss[i] > level >= run.loss[i + 1]:
            share = (run.loss[i] - level) / (run.loss[i] - run.loss[i + 1])
            return float(series[i] + share * (series[i + 1] - series[i]))
    return float("nan")


# The designs

PRELN = {"normalization.kind": "layernorm", "normalization.placement": "pre"}
PLAIN = {"ffn.gated": False, "ffn.constraint": "none", "ffn.width": 4}
GPTS = {
    "PreLN GELU": PRELN | PLAIN | {"activation.name": "gelu"},
    "PreLN ReLU": PRELN | PLAIN | {"activation.name": "relu"},
    "free GELU": PLAIN | {"normalization.kind": "none", "activation.name": "gelu"},
    "free ReLU": PLAIN | {"normalization.kind": "none", "activation.name": "relu"},
    "free leaky": PLAIN | {"normalization.kind": "none", "activation.name": "learnable_leaky_relu"},
}
FREE = {name: values for name, values in GPTS.items() if name != "PreLN ReLU"}
POSITIONS = {name: {"position.name": name} for name in ("rope", "learned", "none", "alibi")}
CONSTRAINTS = {
    name: {"normalization.kind": "none", "ffn.constraint": name}
    for name in ("spectral_norm", "weight_norm", "hyperspherical")
}
PLACES = {"PreLN": "pre", "MixLN": "mix", "PostLN": "post"}
CELLS = {
    f"{token}/{channel}": {
        "model.token_mixing.activation": token,
        "model.channel_mixing.activation": channel,
    }
    for token in ("gelu", "relu")
    for channel in ("gelu", "relu")
}
Value = Callable[[SimpleNamespace], float]


def mean_of(designs: Mapping[str, Any], value: Value, *compared: str) -> Callable[[str], Found]:
    def found(source: str) -> Found:
        runs = named(widest(runs_of(source)), designs)
        return of_mean(runs, [value(run) for run in runs], *compared)

    return found


def difference(designs: Mapping[str, Any], value: Value, a: str, b: str) -> Callable[[str], Found]:
    def found(source: str) -> Found:
        runs = named(widest(runs_of(source)), designs)
        return of_difference(runs, [value(run) for run in runs], a, b)

    return found


def loss(run: SimpleNamespace) -> float:
    return -float(run.loss[-1])


def accuracy(run: SimpleNamespace) -> float:
    return 100 * float(run.record["final"]["val_accuracy"])


def across_widths(design: Mapping[str, Any]) -> Callable[[str], Found]:
    """-r of SE_post and loss over widths given SE_post at step 0, at the learning rate with the
    most completed norm-free runs."""

    def found(source: str) -> Found:
        runs = runs_of(source)
        free = [run for run in runs if run.config["normalization.kind"] == "none"]
        rate = pd.Series([run.config["optimizer.lr"] for run in free]).mode().max()
        runs = [run for run in runs if run not in free or run.config["optimizer.lr"] == rate]
        runs = named(runs, {"own": design})
        end, start = (np.array([run.se_post[i].mean() for run in runs]) for i in (-1, 0))
        return of_correlation(end, -np.array([run.loss[-1] for run in runs]), start)

    return found


def placements(source: str) -> list[SimpleNamespace]:
    """The runs at the learning rate and warm-up with the most PostLN runs that can be compared."""
    names = ("optimizer.lr", "optimizer.schedule.warmup")
    post = [run for run in runs_of(source) if run.config["normalization.placement"] == "post"]
    settings = pd.Series([tuple(run.config[name] for name in names) for run in post])
    best = settings.value_counts().index[0]
    return [run for run in runs_of(source) if tuple(run.config[name] for name in names) == best]


def placement_order(source: str) -> Found:
    designs = {
        f"{name} {width}": {"normalization.placement": place, "ffn.width": width}
        for name, place in PLACES.items()
        for width in (1, 2, 4, 8)
    }
    runs = named(placements(source), designs)
    values = [end_pr_post(run) for run in runs]
    pairs = (("PreLN 8", "MixLN 8"), ("MixLN 8", "PostLN 8"))
    return lowest(*(of_difference(runs, values, *pair) for pair in pairs))


def placement_returns(source: str) -> Found:
    designs = {name: {"normalization.placement": place} for name, place in PLACES.items()}
    runs = named(placements(source), designs)
    values = [end_less_start(np.log(run.pr_post.mean(axis=1))) for run in runs]
    return of_slopes(runs, values, "PreLN", "PostLN")


def optimizers(source: str) -> list[SimpleNamespace]:
    """AdamW, Muon and Dion, each at its learning rate with the lowest loss at seed 0."""
    kept = []
    for name in ("adamw", "muon", "dion"):
        own = [run for run in runs_of(source) if run.config["optimizer.name"] == name]
        best = min((run for run in own if run.seed == 0), key=lambda run: run.loss[-1])
        rate = best.config["optimizer.lr"]
        kept += named(own, {name: {"optimizer.lr": rate}})
    return kept


def at_both(series: Callable[[SimpleNamespace], np.ndarray], *names: str) -> Callable[[str], Found]:
    """The smallest difference between neighbors, at the end and where the loss crosses the highest
    final loss."""

    def found(source: str) -> Found:
        runs = optimizers(source)
        level = max(run.loss[-1] for run in runs if run.design in names)
        ends = [float(series(run)[-1]) for run in runs]
        equal = [at_loss(run, series(run), level) for run in runs]
        pairs = list(itertools.pairwise(names))
        return lowest(
            *(of_difference(runs, values, *pair) for values in (ends, equal) for pair in pairs)
        )

    return found


def middle_layers(source: str) -> Found:
    """-Spearman's r over the means of optimizers and learning rates."""
    rows = [
        {
            "design": (run.config["optimizer.name"], run.config["optimizer.lr"]),
            "pr": end_pr_post(run, slice(4, 8)),
            "loss": -run.loss[-1],
        }
        for run in runs_of(source)
        if run.config["optimizer.name"] in ("adamw", "muon", "dion", "sgd", "adafactor")
    ]
    means = pd.DataFrame(rows).groupby("design").mean()
    return of_correlation(means["pr"].rank().to_numpy(), means["loss"].rank().to_numpy())


def mixer_optimizers(value: Value) -> Callable[[str], Found]:
    """SGD minus AdamW, each at its learning rate with the highest mean accuracy and, among equal
    ones, the lowest loss.

    Accuracies are stored in float32: differences below 1e-3 points count as none.
    """

    def found(source: str) -> Found:
        kept = []
        for name in ("sgd", "adamw"):
            own = [run for run in runs_of(source) if run.config["optimizer.name"] == name]
            table = pd.DataFrame(
                [(run.config["optimizer.lr"], accuracy(run), -run.loss[-1]) for run in own],
                columns=["lr", "accuracy", "loss"],
            )
            means = table.groupby("lr").mean()
            rate = means[means["accuracy"] > means["accuracy"].max() - 1e-3]["loss"].idxmax()
            kept += named(own, {name: {"optimizer.lr": rate}})
        return of_difference(kept, [value(run) for run in kept], "sgd", "adamw")

    return found


def stalls(source: str) -> Found:
    result = json.loads((STUDY / source).read_text())
    stall, between = (
        np.array(result[name]) / result["step_ms"] for name in ("stall_ms", "between_ms")
    )
    runs = [SimpleNamespace(design="measured") for _ in stall]
    effects = (1 - 100 * stall / 1000, stall - between)
    return lowest(*(of_mean(runs, effect, "measured") for effect in effects))


def cost(source: str) -> Found:
    runs = named(widest(runs_of(source)), FREE)
    shares = [1 - 100 * measuring_s(run) / (1000 * step_s(run)) for run in runs]
    steps = [np.log(measuring_s(run) / step_s(run)) for run in runs]
    return lowest(*(of_mean(runs, values, "PreLN GELU") for values in (shares, steps)))


GELU_8 = PRELN | {"activation.name": "gelu"}
FREE_RELU_8 = {"normalization.kind": "none", "activation.name": "relu"}
SECOND: dict[str, Callable[[str], Found]] = {
    "1.pr": mean_of(GPTS, lambda run: end_less_start(log_gain(run)), "PreLN GELU"),
    "1.eee": mean_of(GPTS, eee_fall, "PreLN GELU"),
    "2.loss": difference(GPTS, loss, "PreLN GELU", "PreLN ReLU"),
    "2.pr": difference(GPTS, end_pr_post, "PreLN GELU", "PreLN ReLU"),
    "3.band": mean_of(GPTS, band, "PreLN GELU"),
    "4.pr_pre": mean_of(GPTS, tracking("pr_pre"), "PreLN GELU"),
    "4.se_post": mean_of(GPTS, tracking("se_post"), "PreLN GELU"),
    "5.preln": across_widths(GELU_8),
    "5.normfree": across_widths(FREE_RELU_8),
    "6.inertia": difference(FREE, early_gain, "PreLN GELU", "free GELU"),
    "6.price": difference(FREE, loss, "free ReLU", "free GELU"),
    "7.relu": difference(FREE, first_gain, "free ReLU", "PreLN GELU"),
    "7.leaky": difference(FREE, first_gain, "free leaky", "PreLN GELU"),
    "8.loss": difference(CONSTRAINTS, loss, "spectral_norm", "hyperspherical"),
    "8.flat": difference(CONSTRAINTS, eee_fall, "spectral_norm", "hyperspherical"),
    "9.order": placement_order,
    "9.returns": placement_returns,
    "10.loss": difference(POSITIONS, loss, "rope", "none"),
    "10.deep": difference(POSITIONS, lambda run: end_pr_post(run, slice(4, 12)), "rope", "none"),
    "11.gain": at_both(
        lambda run: np.log(run.pr_post / run.pr_pre).max(axis=1), "adamw", "dion", "muon"
    ),
    "11.pre": at_both(
        lambda run: np.log(run.pr_pre[:, : run.config["model.n_layers"] // 2].mean(axis=1)),
        *("muon", "adamw"),
    ),
    "12.middle": middle_layers,
    "13.pattern": mean_of(CELLS, lambda run: end_less_start(log_gain(run)), *CELLS),
    "13.channel": difference(CELLS, accuracy, "relu/gelu", "gelu/relu"),
    "14.accuracy": mixer_optimizers(accuracy),
    "14.pr": mixer_optimizers(end_pr_post),
    "15.runs": cost,
    "15.stall": stalls,
}


def test_every_core_check_is_computed_a_second_time(of_ids):
    assert set(SECOND) == set(of_ids)


@pytest.mark.parametrize("name", SECOND)
def test_a_core_check_agrees_with_another_computation_from_the_tables(of_ids, name):
    found = of_ids[name]
    if found.estimate is None:
        assert not (STUDY / found.check.sources[0]).exists()
        return
    estimate = found.estimate
    assert (estimate.effect, estimate.low, estimate.high) == pytest.approx(
        SECOND[name](found.source), rel=1e-6, abs=1e-9, nan_ok=True
    )
