"""The rule for verdicts: null models that detect empty results, and the page and the queue against
the code and the sweeps."""

import dataclasses
import importlib
import json
import math
import re
import shlex
from copy import deepcopy
from functools import cache
from itertools import product
from math import nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from studied import STUDY
from support import hydra_at_conf

from nerve.analysis.estimate import Estimate, contrast
from nerve.analysis.partial import partial_correlation
from nerve.cli.config.compose import CONF, SWEEPS

MODULES = ("measured", "effects", "values", "nulls", "check", "gpt", "report")


@pytest.fixture(scope="module")
def rule(scorecard: SimpleNamespace) -> SimpleNamespace:
    """The modules of study/scorecard/criteria, and its checks."""
    criteria = scorecard.criteria
    own = {name: importlib.import_module(f"criteria.{name}") for name in MODULES}
    return SimpleNamespace(CHECKS=criteria.CHECKS, OURS=criteria.OURS, **own)


def made(rule, design, seed, spectra=None, loss=None, steps=(0, 100, 200, 300), n_layers=2):
    """Hand-made runs; metrics that are not given are noise around 10."""
    noise = np.random.default_rng(1)
    shape = (len(design), len(steps), n_layers)
    names = rule.measured.NAMES
    given = {name: 10 + noise.normal(size=shape) for name in names} | (spectra or {})
    nothing = np.full(len(design), np.nan)
    return rule.measured.Measured(
        design=np.array(design),
        seed=np.array(seed),
        width=np.full(len(design), 4.0),
        steps=np.array(steps),
        spectra=given,
        loss=noise.normal(size=shape[:2]) if loss is None else loss,
        accuracy=nothing,
        runs=pd.DataFrame(index=range(len(design))),
        tokens=nothing,
    )


def test_the_smallest_of_effects_without_an_interval_is_the_smallest(rule):
    """With a seed of each design there is no interval; the first effect is not the answer then."""
    one = {
        name: Estimate(effect, nan, nan, nan, 0, 1, 2)
        for name, effect in zip("ab", (2, 0.5), strict=True)
    }
    sure = Estimate(-1.0, -1.5, -0.5, 0.1, 4, 3, 6)
    nan_effect = Estimate(nan, nan, nan, nan, 0, 1, 2)
    lowest = rule.effects.lowest
    assert lowest([one["a"], one["b"]]).effect == 0.5
    assert lowest([sure, one["a"], one["b"]]).effect == 0.5
    assert np.isnan(lowest([one["a"], nan_effect, sure]).effect)
    assert lowest([sure, Estimate(-1.1, -1.2, -1.0, 0.1, 4, 3, 6)]).effect == -1.0


def judged(rule, estimate, runs, labels="design", compared=("a", "b")):
    """A check on such runs."""
    check = rule.check.CoreCheck(
        "1.x", "", "", estimate, {}, compared, (), labels, 2, rule.check.Scale(0, 0, 0, 0), ""
    )
    return rule.check.Judged(check, "made", runs, estimate(runs), None, check._permuted)


def last_post(runs):
    return runs.spectra["pr_post"][:, -1].mean(axis=1)


def test_each_null_model_does_what_its_name_says(rule):
    runs = made(rule, ["a", "b"], [0, 0])
    flat = rule.nulls.untrained(runs).spectra["pr_post"]
    assert (flat == runs.spectra["pr_post"][:, :1]).all()
    time = rule.nulls.clock(runs).spectra["eee_pre"]
    assert np.allclose(time, 1 + np.log1p(runs.steps)[None, :, None])
    back = rule.nulls.clock_backwards(runs).spectra["se_post"]
    assert np.allclose(time + back, 2 + np.log1p(runs.steps[-1]))
    same = rule.nulls.identity(runs).spectra
    assert all((same[f"{m}_post"] == runs.spectra[f"{m}_pre"]).all() for m in ("se", "pr", "eee"))
    assert not same["js"].any()
    for null in (rule.nulls.untrained, rule.nulls.clock, rule.nulls.identity):
        assert null(runs).loss is runs.loss


def test_a_pure_trend_is_caught_by_the_clock(rule):
    """A metric that rises with time in every run while the loss falls: r = -1."""
    steps = tuple(range(0, 1000, 100))
    trend = np.log1p(np.array(steps))[None, :, None] + np.zeros((3, len(steps), 2))
    runs = made(rule, ["a"] * 3, range(3), {"se_pre": trend}, 9 - 2 * trend[:, :, 0], steps=steps)

    def raw(runs):
        series = runs.spectra["se_pre"].mean(axis=2)
        pairs = zip(series, runs.loss, strict=True)
        r = [-partial_correlation(x, y) for x, y in pairs]
        return contrast(np.array(r), runs.design, runs.seed, {"a": 1})

    noisy = runs.with_spectra(
        {"se_pre": trend + 0.01 * np.random.default_rng(0).normal(size=trend.shape)}
        | {name: values for name, values in runs.spectra.items() if name != "se_pre"}
    )
    found = judged(rule, raw, noisy, "step", ("a",))
    assert found.reading == "holds"
    assert found.passes_null == ("clock",)


def test_an_effect_at_step_0_is_caught_by_the_untrained_network_and_its_growth_is_not(rule):
    start = np.array([3.0, 3.1, 2.9, 1.0, 1.1, 0.9])[:, None, None] + np.zeros((6, 4, 2))
    grown = start + np.linspace(0, 1, 4)[None, :, None] * (np.arange(6) < 3)[:, None, None]
    grown = grown + 0.01 * np.random.default_rng(0).normal(size=grown.shape)
    runs = made(rule, ["a"] * 3 + ["b"] * 3, [0, 1, 2] * 2, {"pr_post": grown})
    there = judged(rule, rule.effects.difference(last_post, "a", "b"), runs)
    assert (there.reading, "untrained" in there.passes_null) == ("holds", True)
    growth = rule.effects.difference(
        lambda r: last_post(r) - r.spectra["pr_post"][:, 0, 0], "a", "b"
    )
    gained = judged(rule, growth, runs)
    assert (gained.reading, gained.passes_null) == ("holds", ())


def test_an_effect_that_pre_shares_is_caught_by_the_identity(rule):
    high = 10.0 + np.array([5.0, 5.1, 4.9, 0.0, 0.1, -0.1])[:, None, None] + np.zeros((6, 4, 2))
    runs = made(
        rule, ["a"] * 3 + ["b"] * 3, [0, 1, 2] * 2, {"pr_pre": 1.001 * high, "pr_post": high}
    )
    found = judged(rule, rule.effects.difference(last_post, "a", "b"), runs)
    assert "identity" in found.passes_null
    # What looks at pre alone is not changed, so that the identity says nothing of it.
    pre = rule.effects.difference(lambda r: r.spectra["pr_pre"][:, -1].mean(axis=1), "a", "b")
    assert "identity" not in judged(rule, pre, runs).passes_null


def test_a_coin_is_caught_by_permuted_labels(rule):
    """A check that requires no difference beyond noise holds for about half of all labels."""
    runs = made(rule, ["a"] * 3 + ["b"] * 3, [0, 1, 2] * 2)

    def coin(runs):
        own = last_post(runs)
        sign = float(np.sign(own[runs.design == "a"].mean() - own[runs.design == "b"].mean()))
        return Estimate(sign, sign - 0.1, sign + 0.1, 1.0, 5, 3, 6)

    found = judged(rule, coin, runs)
    assert 0.3 < found.share_permuted < 0.7
    assert "permuted labels" in found.passes_null


def test_an_order_of_three_designs_is_no_evidence_and_one_of_twelve_is(rule):
    for n, reading in ((3, None), (12, "holds")):
        rising = np.arange(n, dtype=float)
        design = [f"{i:02}" for i in range(n)]
        post = 10 + rising[:, None, None] + np.zeros((n, 4, 2))
        loss = 9 - rising[:, None] + np.zeros((n, 4))
        runs = made(rule, design, [0] * n, {"pr_post": post}, loss)
        effect = rule.effects.ranks_the_designs(last_post)
        found = judged(rule, effect, runs, "spectrum", ())
        assert found.reading == reading
        assert "permuted labels" not in found.passes_null


def test_permutations_that_only_rename_designs_are_left_out(rule):
    """Of 720 orders of 3 + 3 runs, 72 keep each three together."""
    runs = made(rule, ["a"] * 3 + ["b"] * 3, [0, 1, 2] * 2)
    changed = list(rule.nulls.permutations(runs, "design", ("a", "b")))
    assert len(changed) == 720 - 72
    pairs = {tuple(sorted(zip(each.design, each.seed, strict=True))) for each in changed}
    assert len(pairs) == 1  # each label is still there once


@pytest.mark.parametrize("labels", ["step", "layer", "spectrum"])
def test_permutations_move_spectra_and_leave_losses(rule, labels):
    runs = made(rule, ["a", "b", "c"], [0, 0, 0])
    values = runs.spectra["js"]
    permutations = list(rule.nulls.permutations(runs, labels, ()))[:20]
    assert permutations
    for changed in permutations:
        moved = changed.spectra["js"]
        assert changed.loss is runs.loss
        assert not np.array_equal(moved, values)
        assert np.array_equal(np.sort(moved, axis=None), np.sort(values, axis=None))


def test_equal_loss_is_interpolated_and_a_run_that_never_gets_there_has_no_value(rule):
    loss = np.array([[9.0, 4.0, 2.0, 1.0], [9.0, 7.0, 5.0, 3.0], [9.0, 8.0, 8.0, 8.0]])
    series = np.array([[0.0, 10.0, 20.0, 30.0]] * 3)
    runs = made(rule, ["a", "b", "c"], [0, 0, 0], loss=loss)
    found = rule.values.at_equal_loss(series, runs, ("a", "b"))
    assert found[:2] == pytest.approx([15.0, 30.0])  # a passes 3 halfway from 4 to 2
    assert math.isnan(found[2])


def test_a_check_whose_requirements_are_not_met_is_undecided(rule, judged):
    found = next(each for each in judged if each.check.id == "8.loss")
    assert (found.reading, found.outcome, found.missing) == ("opposite", "undecided", ["scale"])
    assert found.exploratory


def test_an_incomplete_row_of_runs_does_not_replace_a_complete_one(rule):
    """A row has two folders: one with a single run, and an older one, complete or not."""

    def check_on(missing: dict[str, list[str]]):
        check = dataclasses.replace(rule.CHECKS[0], sources=tuple(missing))
        on = SimpleNamespace(names=set(missing), sweep=lambda source: source)
        judged = {
            name: SimpleNamespace(source=name, missing=each) for name, each in missing.items()
        }
        object.__setattr__(check, "on", lambda source, sweep: judged[source])
        return check.judge(on).source

    assert check_on({"begun": ["seeds (1 of 2)"], "whole": []}) == "whole"
    assert check_on({"whole": [], "older": []}) == "whole"
    assert check_on({"begun": ["seeds (1 of 2)"], "older": ["scale"]}) == "begun"


def test_each_claim_has_one_or_two_core_checks(rule):
    counts = pd.Series([check.claim for check in rule.CHECKS]).value_counts()
    assert sorted(counts.index) == list(range(1, 16))
    assert counts.isin([1, 2]).all()
    assert len({check.id for check in rule.CHECKS}) == len(rule.CHECKS)


def test_the_page_of_the_rule_is_what_its_code_prints(rule, judged):
    page = (STUDY / "criteria.md").read_text("utf-8")
    assert page == rule.report.page(judged)
    assert len(page.splitlines()) <= 170


def test_a_stored_benchmark_gives_the_share_of_a_measurement(rule, tmp_path):
    """Stalls of .9 to 1.1 steps every 1000 steps: .09 to .11%."""
    (tmp_path / "runs").mkdir()
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    check = next(check for check in rule.CHECKS if check.id == "15.stall")

    def judge(stall: list[float], between: list[float]):
        result = {"started": "2026-11-27T00:00:00Z", "step_ms": 100}
        result |= {"stall_ms": stall, "between_ms": between}
        (folder / "monitor.json").write_text(json.dumps(result))
        return check.judge(SimpleNamespace(root=tmp_path / "runs"))

    stalls = [90, 100, 110, 100, 95, 105]
    found = judge(stalls, [0, 0, 5, 0, 5, 0])
    assert found.estimate.effect == pytest.approx(0.9)
    assert (found.outcome, found.exploratory, found.passes_null) == ("holds", False, ())
    assert judge([9 * ms for ms in stalls], [0] * 6).outcome == "holds"
    assert judge([11 * ms for ms in stalls], [0] * 6).outcome == "opposite"
    unseen = judge(stalls, [95, 110, 90, 105, 100, 100])
    assert unseen.outcome == "within noise", "a cost that cannot be told from none is no evidence"


def test_the_time_that_runs_spent_on_measuring_must_be_small_and_visible(rule):
    """Measurements of 30 steps each: 3% at every 1000 steps; of 3 steps: .3%, and visible; with
    permuted times, neither holds."""
    check = next(check for check in rule.CHECKS if check.id == "15.runs")
    runs = made(rule, ["PreLN GELU", "norm-free GELU"] * 2, [0, 0, 1, 1])

    def judged(n_steps: float, noise: float = 0.01):
        step = 0.06 * np.exp(noise * np.random.default_rng(2).normal(size=4))
        measuring = 0.06 * n_steps * len(runs.steps)
        took = {
            "final.measuring_seconds": np.full(4, measuring),
            "final.train_seconds": measuring + step * runs.steps[-1],
        }
        changed = dataclasses.replace(runs, runs=runs.runs.assign(**took))
        estimate = check.estimate
        return rule.check.Judged(check, "made", changed, estimate(changed), None, check._permuted)

    assert judged(3).estimate.effect == pytest.approx(0.7, abs=0.01)
    assert judged(3).reading == "holds"
    assert judged(30).reading == "opposite"
    assert judged(3).passes_null == ()
    assert len(list(judged(3).permuted(judged(3)))) == 3, "of two runs one, the other or both"
    assert judged(1, noise=0.5).reading == "within noise", "a measurement that is no longer"


def queued() -> dict[str, list[str]]:
    """The commands of the queue that need no new code, by the id of their row."""
    rows = {}
    for line in (STUDY / "queue.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 7 and "nerve-run " in cells[1] and "needs code" not in cells[6]:
            rows[cells[0]] = shlex.split(cells[1].strip("`"))[1:]
    return rows


@cache
def with_options(name: str, options: tuple[str, ...]) -> DictConfig:
    return compose(name, list(options))


def composed(name: str, overrides: list[str]) -> DictConfig:
    """Composed like by Hydra, except for its own values: first the options of groups, then the
    others."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = {path.name for root in (CONF, SWEEPS) for path in root.iterdir() if path.is_dir()}
    options = [each.input_line for each in parsed if each.key_or_group in groups]
    cell = deepcopy(with_options(name, tuple(options)))
    for each in parsed:
        if each.input_line not in options and not each.is_hydra_override():
            OmegaConf.update(cell, each.key_or_group, each.value())
    return cell


def cells_of(command: list[str]) -> tuple[str, list[dict]]:
    """The folder that a command writes to, and each of its trials as plain values by dotted
    name."""
    name = command[0].removeprefix("--config-name=")
    with hydra_at_conf():
        given = OverridesParser.create().parse_overrides(command[1:])
        swept = {each.key_or_group: each for each in given if each.is_sweep_override()}
        fixed = [each.input_line for each in given if not each.is_sweep_override()]
        hydra = compose(name, fixed, return_hydra_config=True).hydra
        axes = {key: f"{key}={value}" for key, value in hydra.sweeper.params.items()}
        axes = {key: line for key, line in axes.items() if not named(key, fixed)}
        axes |= {key: each.input_line for key, each in swept.items()}
        parsed = OverridesParser.create().parse_overrides(list(axes.values()))
        values = {
            axis.key_or_group: [f"{axis.key_or_group}={x}" for x in axis.sweep_string_iterator()]
            if axis.is_sweep_override()
            else [axis.input_line]
            for axis in parsed
        }
        # A seed changes nothing else, and to compose takes a tenth of a second.
        seeds = [int(each.partition("=")[2]) for each in values.pop("seed", [])]
        cells = [composed(name, [*cell, *fixed]) for cell in product(*values.values())]
    # The logger's paths are known to a running job only.
    kept = [OmegaConf.masked_copy(cell, [str(k) for k in cell if k != "logger"]) for cell in cells]
    plain = [OmegaConf.to_container(cell, resolve=True) for cell in kept]
    leaves = [pd.json_normalize(cell).iloc[0].to_dict() for cell in plain]
    spread = [cell | {"seed": x} for cell in leaves for x in seeds or [cell["seed"]]]
    return Path(hydra.sweep.dir).name, spread


def named(key: str, fixed: list[str]) -> bool:
    return any(line.partition("=")[0] == key for line in fixed)


def n_points(check, cells: list[dict]) -> int:
    """The number of runs, or designs, that a check loads from a folder."""
    loaded = [
        (name, cell["seed"])
        for name, design in check.designs.items()
        for cell in cells
        if all(cell.get(key) == value for key, value in design.items())
    ]
    return len({name for name, _ in loaded}) if check.unit == "designs" else len(loaded)


def test_the_queue_gives_every_check_of_new_runs_its_designs_and_its_scale(rule):
    """Every command composes, and the trials of a folder together meet the requirements of its
    checks."""
    folders: dict[str, list[dict]] = {}
    rows = queued()
    assert list(rows)[:5] == ["0a", "0b", "0c", "1a", "2"]
    for line in (STUDY / "queue.md").read_text("utf-8").splitlines():
        if match := re.match(r"\| (\w+) \| `nerve-run .*?\| .*?\| (\d+) \|", line):
            row, n_runs = match.groups()
            if row in rows:
                folder, cells = cells_of(rows[row])
                assert len(cells) == int(n_runs), row
                folders.setdefault(folder, []).extend(cells)
    fed = 0
    for check in rule.CHECKS:
        source = check.sources[0]
        if source not in folders:
            continue
        fed += 1
        cells = folders[source]
        seeds = {
            name: {
                cell["seed"]
                for cell in cells
                if all(cell.get(key) == value for key, value in check.designs[name].items())
            }
            for name in check.compared
        }
        assert all(seeds.values()), (check.id, seeds)
        if check.unit == "seeds":
            assert len(set.intersection(*seeds.values())) >= check.seeds, check.id
        else:
            assert n_points(check, cells) >= check.seeds, check.id
        for cell in cells:
            n_sequences = cell["trainer.max_steps"] * cell["data.batch_size"]
            tokens = n_sequences * cell.get("model.seq_len", 0)  # images have none
            assert cell["trainer.max_steps"] >= check.scale.steps, check.id
            assert tokens >= check.scale.tokens, check.id
            assert cell["model.n_layers"] >= check.scale.n_layers, check.id
            assert cell["model.d_model"] >= check.scale.d_model, check.id
    assert fed >= 15
