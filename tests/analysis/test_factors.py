"""Factors that distinguish runs, those that follow others, and those that are constant."""

import numpy as np
import pandas as pd
import pytest

from nerve.analysis.compare import average_seeds, final_metrics, metrics_at_loss
from nerve.analysis.correlate import correlate_within_runs
from nerve.analysis.correlate_across import correlate_across_runs
from nerve.analysis.depth import depth_means, metrics_by_depth
from nerve.analysis.early import rank_early
from nerve.analysis.factors import (
    TAKEN,
    describe_ties,
    find_factors,
    level_text,
    levels_of,
    ordered_levels,
)
from nerve.analysis.flags import flag_runs
from nerve.analysis.groups import contrast_groups, contrasts, pr_of_groups
from nerve.analysis.leaves import RECORDED
from nerve.analysis.load import load_runs
from nerve.analysis.scaling import fit_width_scaling
from nerve.sites_and_groups import GROUP_SITES, GROUPINGS, POOLED
from nerve.storage.identity import ORIGINAL_GROUPS

RECORD = {"run_id": "r", "sweep": "s", "step": 1, "final.val_loss": 1.0, "versions.torch": "2"}


def runs_of(*designs: dict) -> pd.DataFrame:
    """Two seeds of each design, with the record's own fields, which also differ."""
    rows = [
        {**design, "design_id": f"design {i}", "seed": seed, **RECORD, "final.val_loss": i + seed}
        for i, design in enumerate(designs)
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows)


def test_factors_are_the_leaves_that_vary_design_factors_first():
    factors = find_factors(
        runs_of(
            {"model.n_layers": 2, "activation.name": "gelu", "position.name": "rope"},
            {"model.n_layers": 4, "activation.name": "gelu", "position.name": "rope"},
            {"model.n_layers": 4, "activation.name": "relu", "position.name": "rope"},
        )
    )
    assert factors.varying == ("activation.name", "model.n_layers")
    assert factors.constant == {"position.name": "rope"}
    assert factors.together == {}


OF_NERVE_RUN = {f"{group}.x": 1 for group in ORIGINAL_GROUPS}


def test_seeds_results_places_and_targets_are_no_factors():
    factors = find_factors(
        runs_of(
            {
                **OF_NERVE_RUN,
                "pre_scales.ffn/00": 2.0,
                "data.cache_dir": "a",
                "threads": 1,
                "data._target_": "x",
                "measure.skip_first": 0,
                "flag": 1,
                "d_ff": 1,
                "weights": '["0 12ab"]',
            },
            {
                **OF_NERVE_RUN,
                "pre_scales.ffn/00": 3.0,
                "data.cache_dir": "b",
                "threads": 2,
                "data._target_": "y",
                "measure.skip_first": 0,
                "flag": 2,
                "d_ff": 2,
                "weights": '["0 34cd"]',
            },
        )
    )
    assert factors.varying == ()


def test_what_nerve_run_excludes_is_a_factor_of_other_runs():
    """`objective` and `checkpoint` of a user's runs mean what the user says; beside them, those of
    nerve-run say nothing about the result. So do `weights` that are no digest of `measure`."""
    assert find_factors(runs_of({"weights": "random"}, {"weights": "dino"})).varying == ("weights",)
    mine = [
        {"objective": each, "checkpoint.every_n_steps": n}
        for each in ("mlm", "clm")
        for n in (1, 2)
    ]
    ours = [{**OF_NERVE_RUN, "checkpoint.every_n_steps": n, "threads": n} for n in (1, 2)]
    assert find_factors(runs_of(*mine)).varying == ("objective", "checkpoint.every_n_steps")
    assert find_factors(runs_of(*ours)).varying == ()
    both = find_factors(runs_of(*mine, *ours))
    assert {"objective", "checkpoint.every_n_steps"} <= {*both.varying}
    assert "threads" not in {
        *both.varying,
        *(name for each in both.together.values() for name in each),
    }


def test_a_varying_key_with_the_name_of_a_result_is_reported(tmp_path, make_run):
    """In a user's runs; inside a group it is a factor. Constant keys are not named."""
    for i, lr in enumerate((0.1, 0.2)):
        make_run(tmp_path / f"bare{i}", {"lr": lr, "data": "mine"})
        make_run(tmp_path / f"grouped{i}", {"optimizer": {"lr": lr}})
    runs = load_runs(tmp_path)
    is_bare = runs["lr"].notna()
    bare, grouped = find_factors(runs[is_bare]), find_factors(runs[~is_bare])
    assert (bare.varying, bare.taken) == ((), ("lr",))
    (sentence,) = describe_ties(bare)
    assert 'config={"group": {"lr": …}} gives group.lr' in sentence
    assert (grouped.varying, grouped.taken) == (("optimizer.lr",), ())


def test_leaves_that_split_the_runs_alike_are_confounded():
    factors = find_factors(
        runs_of(
            {"activation.name": "gelu", "activation.slope": None, "ffn.width": 4},
            {"activation.name": "relu", "activation.slope": 0.0, "ffn.width": "8/3"},
        )
    )
    assert factors.varying == ("activation.name",)
    assert factors.together == {"activation.name": ("ffn.width", "activation.slope")}
    (sentence,) = describe_ties(factors)
    assert sentence.endswith("cannot be separated: ffn.width, activation.slope.")


def test_a_name_determines_other_leaves_but_unique_numbers_do_not():
    """The momentum follows from the optimizer; the decay does not follow from a unique learning
    rate."""
    designs = [
        {"optimizer.name": name, "optimizer.momentum": momentum, "optimizer.lr": lr, "z.decay": d}
        for name, momentum, lr, d in [
            ("adamw", None, 1e-3, 0.0),
            ("muon", 0.9, 2e-3, 0.1),
            ("dion", 0.9, 3e-3, 0.0),
            ("adamw", None, 4e-3, 0.1),
        ]
    ]
    factors = find_factors(runs_of(*designs))
    assert factors.varying == ("optimizer.name", "optimizer.lr", "z.decay")
    assert factors.together == {"optimizer.name": ("optimizer.momentum",)}


def test_the_rate_of_an_optimizers_part_is_confounded_with_the_rate_where_there_is_one():
    """Only one of two optimizers has this part, so its rate is not a separate factor."""
    designs = [
        {"optimizer.name": name, "optimizer.lr": lr, "optimizer.parts.main.lr": own}
        for name, lr, own in [
            ("adamw", 1e-3, 1e-3),
            ("adamw", 2e-3, 2e-3),
            ("muon", 2e-3, None),
            ("muon", 1e-2, None),
        ]
    ]
    factors = find_factors(runs_of(*designs))
    assert factors.varying == ("optimizer.name", "optimizer.lr")
    assert factors.together == {"optimizer.lr": ("optimizer.parts.main.lr",)}


def test_a_leaf_that_a_number_determines_is_confounded_if_several_designs_show_it():
    """The number of heads is determined by the size; each size has two widths."""
    designs = [
        {"ffn.width": width, "model.d_model": size, "model.n_heads": heads}
        for width in (2, 4)
        for size, heads in ((64, 4), (96, 4), (128, 8))
    ]
    factors = find_factors(runs_of(*designs))
    assert factors.varying == ("ffn.width", "model.d_model")
    assert factors.together == {"model.d_model": ("model.n_heads",)}


def test_a_missing_leaf_is_a_level_and_long_lists_of_confounded_keys_are_shortened():
    first = {"activation.name": "gelu"}
    second = {"activation.name": "relu"} | {f"x.leaf{i}": 1 for i in range(9)}
    (sentence,) = describe_ties(find_factors(runs_of(first, second)))
    assert sentence.endswith("x.leaf4, x.leaf5 and 3 more.")


def test_a_key_with_the_name_of_a_result_that_follows_a_factor_is_confounded_with_it():
    factors = find_factors(runs_of({"x.width": 1, "lr": 0.1}, {"x.width": 2, "lr": 0.2}))
    assert (factors.varying, factors.taken) == (("x.width",), ())
    assert factors.together == {"x.width": ("lr",)}


def test_a_string_that_looks_like_another_value_is_in_quotes():
    values = ["1", "-1.5", "1e-3", "inf", "true", "not set", "gelu", "8/3", "1a", ""]
    assert [level_text(value) for value in values] == [
        *("'1'", "'-1.5'", "'1e-3'", "'inf'", "'true'", "'not set'", "gelu", "8/3", "1a", "")
    ]
    assert ordered_levels(pd.Series(["1", 1, None, True, 1.0], dtype=object)) == [
        1,
        "1",
        True,
        None,
    ]


def test_different_large_integers_are_different_levels_beside_a_missing_value():
    values = pd.Series([12345678901, 12345678902, None, -0.0])
    assert list(levels_of(values)) == ["12345678901", "12345678902", "not set", "0"]


def test_taken_names_are_exactly_the_columns_of_results_with_factors(tables):
    """`dose_response` refuses such factors itself, and `compare_seeds` has no factors as columns;
    `clock` is a null model beside the factors, and `points` a column of a report."""
    metrics, runs = tables({"rows": [{"step": 0, "val_loss": 6.0}, {"step": 1}]})
    pairs = {(site, group) for _, site, *groups in contrasts() for group in groups}
    pairs |= {
        (site, part) for site in GROUP_SITES for parts in GROUPINGS.values() for part in parts
    }
    pairs |= {(site, POOLED) for site in GROUP_SITES}
    at = {"run_id": "run0", "step": 1, "layer": 0, "ffn": "ffn", "pr": 2.0}
    groups = pr_of_groups(
        metrics, pd.DataFrame([at | {"site": s, "group": g} for s, g in pairs]), runs
    )
    final, at_loss = final_metrics(metrics, runs), metrics_at_loss(metrics, runs)
    results = [
        *(metrics, flag_runs(metrics, runs), final, at_loss, average_seeds(final)),
        *(average_seeds(at_loss), correlate_across_runs(final), fit_width_scaling(final)),
        *(correlate_within_runs(metrics, runs, by_layer=True), rank_early(metrics, runs)),
        *(metrics_by_depth(metrics, runs), depth_means(metrics, runs)),
        *(groups, contrast_groups(groups)),
    ]
    columns = {name for result in results for name in result.columns}
    assert columns - TAKEN <= RECORDED
    assert TAKEN - columns == {"clock", "points"}


@pytest.mark.parametrize("seed", range(20))
def test_factors_of_random_runs_are_those_of_the_definition(seed):
    """Written down level by level, for keys of numbers and of names that may be missing."""
    random = np.random.default_rng(seed)
    columns = {f"x.{i}": random.integers(random.integers(2, 5), size=12) for i in range(4)}
    columns |= {f"x.n{i}": random.choice(["a", "b", None], 12) for i in range(2)}
    columns["x.of"] = columns["x.0"] // 2
    designs = random.integers(8, size=12).astype(str)
    runs = pd.DataFrame({**columns, "design_id": designs}).astype({"x.n0": "str"})
    texts = {name: levels_of(runs[name]).tolist() for name in columns}

    def follows(name: str, other: str) -> bool:
        own, its = texts[name], texts[other]
        by_level = {t: {a for a, b in zip(own, its, strict=True) if b == t} for t in its}
        back = {t: {b for a, b in zip(own, its, strict=True) if a == t} for t in own}
        if all(len(each) == 1 for each in by_level.values()):
            n = [len({d for d, b in zip(designs, its, strict=True) if b == t}) for t in by_level]
            is_name = other.startswith("x.n")
            if all(len(each) == 1 for each in back.values()):
                return True
            if (max if is_name else min)(n) > 1:
                return True
        has = [(a, b) for a, b in zip(own, its, strict=True) if a != "not set"]
        sizes = {len(set(has)), len({a for a, _ in has}), len({b for _, b in has})}
        return len(sizes) == 1 and len(set(has)) > 1

    varying: list[str] = []
    for name in (each for each in columns if len(set(texts[each])) > 1):
        if not any(follows(name, other) for other in varying):
            varying.append(name)
    assert find_factors(runs).varying == tuple(varying)
