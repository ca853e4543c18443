"""Every reason why a run cannot be compared is named."""

import math

import pandas as pd
import pytest

from nerve.analysis.flags import FLAGS, flag_runs
from nerve.analysis.load import load_metrics, load_runs
from nerve.errors import ConfigError, DivergedError
from nerve.storage.find import IncompleteWarning
from nerve.storage.parts import DamagedPartWarning


def losses(*values, **last):
    """Rows at steps 0, 10, 20, … with these validation losses, and further columns of the last."""
    rows = [{"step": 10 * i, "val_loss": loss} for i, loss in enumerate(values)]
    return [*rows[:-1], rows[-1] | last]


@pytest.mark.parametrize(
    ("spec", "flag", "reason"),
    [
        ({"rows": losses(8, 6, 5)}, "ok", ""),
        (
            {"rows": losses(8, 7.5, 7)},
            "untrained",
            "Its lowest validation loss, 7, is not below its unigram loss 7.",
        ),
        (
            {"rows": losses(2.4, 2.5), "unigram_loss": None},
            "untrained",
            "lowest validation loss, 2.4, is not below the loss 2.4 of its first measured step.",
        ),
        ({"rows": losses(2.4, 2.3), "unigram_loss": None}, "ok", ""),
        (
            {"rows": losses(8, 6, 7.25)},
            "diverged",
            "The validation loss ends at 7.25; its lowest was 6, and its unigram loss 7 the limit.",
        ),
        ({"rows": losses(8, 6, math.inf)}, "diverged", "ends at inf; its lowest was 6"),
        ({"rows": losses(8, 6, math.nan, train_loss=math.nan)}, "diverged", "ends at nan"),
        ({"rows": losses(8, 6, math.nan, status="non_finite")}, "diverged", "ends at nan"),
        ({"rows": losses(2.4), "unigram_loss": None}, "ok", ""),
        ({"rows": losses(7.5)}, "untrained", "7.5, is not below its unigram loss 7."),
        (
            {"rows": losses(8, 6), "run_status": "failed", "error": DivergedError("NaN at 14")},
            "diverged",
            "DivergedError: NaN at 14",
        ),
        (
            {"rows": losses(8, 6), "run_status": "failed", "error": ValueError("full disk")},
            "failed",
            "ValueError: full disk (last measured at step 10)",
        ),
        (
            {"rows": losses(8, 6), "run_status": "interrupted"},
            "interrupted",
            "It was interrupted (last measured at step 10).",
        ),
        ({"rows": losses(8, 6), "run_status": "running"}, "running", "still running, or was"),
        ({"rows": losses(None, None)}, "no loss", "None of its rows has a validation loss."),
    ],
)
def test_the_flag_and_its_reason(tables, spec, flag, reason):
    (row,) = flag_runs(*tables(spec)).itertuples()
    assert row.flag == flag
    assert flag in FLAGS
    assert reason in row.reason
    assert (row.reason == "") == (flag == "ok")


@pytest.mark.parametrize(
    ("rows", "flag", "final_loss"),
    [
        # Evaluated at every second step, and not at the last one: by its training loss, or by the
        # first steps if that is not known, as for a loss that is computed outside of the model.
        (losses(8, None, 6, None), "ok", 6),
        (losses(8, None, 6, None, train_loss=None), "ok", 6),
        (losses(None, 6, None, train_loss=None), "ok", 6),
        (losses(None, 6, None, status="non_finite_post"), "diverged", None),
        (losses(8, 6, None), "ok", 6),
        (losses(8, 6, None, None, train_loss=None), "diverged", None),
        (losses(8, 6, 7.5, None), "diverged", 7.5),
        (losses(8, 7.5, None), "untrained", 7.5),
    ],
)
def test_a_run_that_is_not_evaluated_at_its_last_step_has_not_diverged(
    tables, rows, flag, final_loss
):
    """A Trainer evaluates less often than features are measured. Beside a run that is."""
    other = {"rows": losses(8, 6, 5)}
    found = flag_runs(*tables(other, {"rows": rows}, other))
    assert list(found["flag"]) == ["ok", flag, "ok"]
    assert found["final_loss"].fillna(-1).tolist() == [5, final_loss or -1, 5]
    assert found["final_step"].tolist() == [20, 10 * (len(rows) - 1), 20]


def test_a_run_without_metrics(tables):
    with pytest.warns(IncompleteWarning):
        metrics, runs = tables({"rows": losses(8, 6)}, {"rows": []})
    flags = flag_runs(metrics, runs)
    assert list(flags["flag"]) == ["ok", "no metrics"]
    assert list(flags["n_steps"]) == [2, 0]
    assert flags["final_loss"].isna().tolist() == [False, True]


def test_nothing_but_runs_without_metrics(tables):
    with pytest.warns(IncompleteWarning):
        metrics, runs = tables({"rows": [], "run_status": "failed"}, {"rows": []})
    flags = flag_runs(metrics, runs)
    assert list(flags["flag"]) == ["failed", "no metrics"]
    assert flags["reason"][0] == "It failed (never measured)"


def test_a_damaged_part_makes_a_run_incomplete(tables, tmp_path):
    _, runs = tables({"rows": losses(8, 6)}, {"rows": losses(8, 6)})
    (tmp_path / "run1" / "metrics" / "part-000000000099.parquet").write_bytes(b"PAR1")
    with pytest.warns(DamagedPartWarning):
        metrics = load_metrics(tmp_path)
    assert list(metrics.groupby("run_id")["n_damaged_parts"].unique().str[0]) == [0, 1]
    flags = flag_runs(metrics, runs)
    assert list(flags["flag"]) == ["ok", "incomplete"]
    assert flags["reason"][1] == "Parts of its metrics cannot be read: 1."


def test_the_numbers(tables):
    """Counts and losses computed by hand; a dead layer is counted but not flagged."""
    dead = {"status": "no variance", "pr_pre": None}
    rows = [
        {"step": step, "layer": layer, "val_loss": loss, **(dead if layer else {})}
        for step, loss in ((0, 8.0), (10, 5.0), (15, 6.0))
        for layer in range(2)
    ]
    metrics, runs = tables({"rows": rows[::-1], "seed": 3})
    (row,) = flag_runs(metrics, runs).itertuples()
    assert (row.seed, row.flag, row.n_steps, row.n_null) == (3, "ok", 3, 3)
    assert (row.first_loss, row.min_loss, row.final_loss, row.final_step) == (8, 5, 6, 15)
    assert row.unigram_loss == 7


def test_data_is_corpus_and_tokenizer_and_not_the_held_out_set(tables):
    prints = [
        {"corpus": "a", "tokenizer": "t", "heldout": "h"},
        {"corpus": "a", "tokenizer": "t", "heldout": "i"},
        {"corpus": "a", "tokenizer": "u", "heldout": "h"},
        {"corpus": "b", "heldout": "h"},
        {"tokenizer": "t"},
        {"tokenizer": "u"},
        {},
    ]
    with pytest.warns(UserWarning, match="fingerprints"):
        metrics, runs = tables(*({"rows": losses(8, 6), "fingerprints": p} for p in prints))
    flags = flag_runs(metrics, runs)
    data = list(flags["data"])
    assert data[0] == data[1]
    assert len(set(data[1:])) == 6
    assert pd.isna(data[6])
    assert list(flags["heldout"][:4]) == ["h", "i", "h", "h"]
    assert len(data[0]) == 8


def test_rows_of_other_runs_are_ignored(tables):
    metrics, runs = tables({"rows": losses(8, 6)}, {"rows": losses(8, 9)})
    flags = flag_runs(metrics, runs[runs["run_id"] == "run1"])
    assert list(flags["run_id"]) == ["run1"]
    assert list(flags["flag"]) == ["untrained"]


def test_a_run_with_two_rows_is_refused(tables):
    metrics, runs = tables({"rows": losses(8, 6)})
    with pytest.raises(ConfigError, match="got more of run0"):
        flag_runs(metrics, pd.concat([runs, runs]))


def test_a_frame_without_its_columns_is_refused(tables):
    metrics, runs = tables({"rows": losses(8, 6)})
    with pytest.raises(ConfigError, match=r"rows of load_metrics with the column val_loss"):
        flag_runs(metrics.drop(columns="val_loss"), runs)
    with pytest.raises(ConfigError, match="rows of load_runs with the column run_status"):
        flag_runs(metrics, runs.rename(columns={"run_status": "status"}))


@pytest.mark.filterwarnings("ignore::nerve.storage.find.FingerprintWarning")
def test_a_repeated_run_is_not_a_further_seed(tables):
    """The same configuration and seed on the same data count once; a failed run does not count."""
    again = {"rows": losses(8, 6), "seed": 4, "fingerprints": {"heldout": "a"}}
    specs = [
        again | {"run_status": "failed"},
        again,
        again,
        again | {"seed": 5},
        again | {"fingerprints": {"heldout": "b"}},
        again,
    ]
    flags = flag_runs(*tables(*specs))
    assert list(flags["flag"]) == ["failed", "ok", "repeat", "ok", "ok", "repeat"]
    assert flags["reason"][5].startswith("It repeats run run1: the same configuration and seed")


@pytest.mark.filterwarnings("ignore::nerve.storage.find.FingerprintWarning")
def test_runs_that_differ_only_in_their_recorded_seed_are_separate_samples(tmp_path, make_run):
    """Their configuration does not contain the seed; without a recorded seed, they are repeats."""
    for i, seed in enumerate([0, 1, 0, None, None]):
        values = {} if seed is None else {"seed": seed}
        config = {"optimizer": {"lr": 0.1}}
        record = make_run(tmp_path / str(i), config, run_id=f"run{i}", unigram_loss=7.0, **values)
        record.finish("done")
    flags = flag_runs(load_metrics(tmp_path), load_runs(tmp_path))
    assert flags["config_id"].nunique() == 1
    assert list(flags["flag"]) == ["ok", "ok", "repeat", "ok", "repeat"]
    assert "run run0: the same configuration and seed on" in flags["reason"][2]
    assert "run run3: the same configuration and no recorded seed on" in flags["reason"][4]
