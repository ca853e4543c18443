"""Frames: one row per run with its factors, and stored rows joined with the requested columns."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nerve.analysis import gather, run_rows
from nerve.analysis.factors import find_factors
from nerve.analysis.flags import flag_runs
from nerve.analysis.load import (
    Runs,
    load_groups,
    load_metrics,
    load_runs,
    load_scalars,
    load_spectra,
)
from nerve.errors import ConfigError, StoreError
from nerve.storage.find import FingerprintWarning, IncompleteWarning
from nerve.storage.identity import ORIGINAL_GROUPS, completed, config_id
from nerve.storage.parts import DamagedPartWarning, read_part
from nerve.storage.record import RunRecord
from nerve.storage.record_file import DamagedRecordWarning
from nerve.storage.schema import DATASETS, METRICS_SCHEMA
from nerve.storage.store import RunStore

HALVES = [
    {
        "step": 20,
        "layer": 0,
        "ffn": "ffn",
        "site": site,
        "grouping": grouping,
        "group": group,
        "n_samples": n,
        "dim": 8,
        "se": 1.0,
        "pr": pr,
        "eee": 0.5,
        "variance": 1.0,
        "se_spread": 1.0,
        "pr_spread": 1.0,
        "eee_spread": 1.0,
        "status": "ok",
    }
    for site in ("pre", "post")
    for grouping, group, n, pr in (
        ("all", "all", 100, 5.0),
        ("halves", "a", 50, 3.0),
        ("halves", "b", 50, 3.0),
    )
]
"""PR that halves say is far from that of endlessly many samples."""

HOSTILE = 'two\nlines <script>alert(1)</script> "=cmd|1" ü \u202e'


@pytest.fixture
def sweep(tmp_path, make_run):
    """Three runs: done, failed, and one marked as running."""
    configs = [
        {"normalization": {"kind": "layernorm"}, "optimizer": {"betas": [0.9, 0.95]}, "seed": 1},
        {"normalization": {"kind": "none"}, "ffn": {"width": "8/3"}, "note": HOSTILE, "seed": 2},
        {"normalization": {"kind": "rmsnorm"}, "ffn": {"width": 4}, "seed": 3, "step": 9},
    ]
    records = [
        make_run(tmp_path / "sweep" / name, config, sweep="sweep", seed=config["seed"])
        for name, config in zip("abc", configs, strict=True)
    ]
    records[0].finish("done", step=10, final={"val_loss": 3.5})
    records[1].finish("failed", ValueError(HOSTILE), step=5)
    return records


@pytest.mark.parametrize(
    ("recorded", "configured", "seed"),
    [(3, 3, 3), (3, 4, 3), (None, 4, 4), (None, True, None), (None, "4", None), (None, None, None)],
)
def test_the_seed_is_the_recorded_one_or_that_of_the_configuration(
    tmp_path, make_run, recorded, configured, seed
):
    """A measured run has recorded none, and has it in its configuration alone."""
    make_run(tmp_path / "run", {"seed": configured}, seed=recorded)
    (found,) = load_runs(tmp_path)["seed"]
    assert found == seed if seed is not None else pd.isna(found)


def test_one_row_per_run_with_a_column_for_each_leaf(sweep, tmp_path):
    runs = load_runs(tmp_path)
    assert list(runs["run_id"]) == [record.run_id for record in sweep]
    assert list(runs["run_status"]) == ["done", "failed", "running"]
    assert list(runs["normalization.kind"]) == ["layernorm", "none", "rmsnorm"]
    assert list(runs["ffn.width"][1:]) == ["8/3", 4]
    assert pd.isna(runs["ffn.width"][0])
    assert runs["optimizer.betas"][0] == "[0.9, 0.95]"
    assert list(runs["seed"]) == [1, 2, 3]
    assert list(runs["step"]) == [10, 5, 0]
    assert runs["final.val_loss"][0] == 3.5
    assert runs["final.val_loss"].isna().tolist() == [False, True, True]
    assert runs["note"][1] == HOSTILE
    assert runs["error"][1] == f"ValueError: {HOSTILE}"
    assert runs["directory"][0] == str(tmp_path / "sweep" / "a")
    assert runs["ended"].notna().tolist() == [True, True, False]
    assert (runs["ended"] - runs["started"])[0] >= pd.Timedelta(0)
    assert runs.columns.is_unique
    assert {"host", "device", "n_parameters", "versions.python", "sweep"} <= set(runs.columns)


def test_runs_that_differ_in_their_seed_alone_share_a_design(tmp_path, make_run):
    """Also if values that nerve-run excludes, such as threads, differ, but not if a factor does."""
    of_nerve_run = {group: {"x": 1} for group in ORIGINAL_GROUPS}
    configs = [
        {**of_nerve_run, "ffn": {"width": 4}, "seed": 0},
        {**of_nerve_run, "ffn": {"width": 4}, "seed": 1, "threads": 2},
        {**of_nerve_run, "ffn": {"width": 8}, "seed": 0},
    ]
    for i, config in enumerate(configs):
        make_run(tmp_path / str(i), config, steps=())
    runs = load_runs(tmp_path)
    assert runs["config_id"].nunique() == 3
    assert runs["design_id"][0] == runs["design_id"][1] != runs["design_id"][2]


def test_metrics_of_a_run_a_sweep_and_several_paths(sweep, tmp_path):
    assert len(load_metrics(tmp_path / "sweep" / "a")) == 4
    assert len(load_metrics(tmp_path)) == 12
    assert len(load_metrics([tmp_path / "sweep" / "a", tmp_path / "sweep" / "c"])) == 8


def test_metrics_are_joined_with_status_and_factors(sweep, tmp_path):
    """Unfinished and failed runs are included, and can be recognized."""
    metrics = load_metrics(tmp_path, factors=["normalization.kind", "seed", "final.val_loss"])
    by_run = metrics.groupby("run_id", sort=False)
    assert list(by_run["run_status"].unique().str[0]) == ["done", "failed", "running"]
    assert list(by_run["normalization.kind"].first()) == ["layernorm", "none", "rmsnorm"]
    assert list(by_run["seed"].nunique()) == [1, 1, 1]
    assert metrics["seed"].dtype == np.int64
    assert list(metrics["final.val_loss"].isna()) == [False] * 4 + [True] * 8
    assert list(metrics["step"]) == [0, 0, 10, 10] * 3


def test_derived_columns_are_their_formulas(tmp_path, make_run):
    """By hand for SE 1 → 1.5, PR 2 → 5, EEE .75 → .25 with D = 8, d_in = 4, N = 100."""
    make_run(tmp_path)
    first = load_metrics(tmp_path).iloc[0]
    assert first["exp_se_pre"] == pytest.approx(2.718281828459045, rel=1e-15)
    assert first["exp_se_post"] == pytest.approx(4.4816890703380645, rel=1e-15)
    assert first["pr_gain"] == 2.5
    assert first["delta_eee"] == -0.5
    assert first["se_pre_normalized"] == pytest.approx(1 / 2.0794415416798357, rel=1e-15)
    assert first["se_post_normalized"] == pytest.approx(1.5 / 2.0794415416798357, rel=1e-15)
    assert first["pr_pre_fraction"] == 0.25
    assert first["pr_post_fraction"] == 0.625
    assert first["rank_limit_pre"] == 4
    assert first["rank_limit_post"] == 8


def test_derived_columns_are_missing_where_nothing_was_measured(tmp_path, make_run, row):
    """A dead layer and a single feature give no number and no warning about a division."""
    record = make_run(tmp_path, steps=())
    store = RunStore(tmp_path, record.run_id)
    dead = dict.fromkeys(["se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js"])
    one = row(0, 1, d_ff=1, se_pre=0.0, se_post=0.0, pr_pre=1.0, pr_post=1.0)
    store.append_metrics([row(0, 0, **dead, status="no variance"), one])
    store.flush(0)
    metrics = load_metrics(tmp_path)
    derived = ["pr_gain", "delta_eee", "se_pre_normalized", "pr_post_fraction"]
    assert metrics.loc[0, derived].isna().all()
    assert metrics["status"][0] == "no variance"
    assert metrics["pr_gain"][1] == 1.0
    assert np.isnan(metrics["se_pre_normalized"][1])


@pytest.mark.parametrize(
    ("factor", "near"),
    [
        ("normalization.knd", "normalization.kind"),
        ("kind", "normalization.kind"),
        ("normalization", "normalization.kind"),
        ("step", "already"),
        ("zzz", r"must be a column of load_runs; got 'zzz'\. .*see load_runs"),
    ],
)
def test_the_error_for_an_unknown_factor_suggests_similar_names(sweep, tmp_path, factor, near):
    with pytest.raises(ConfigError, match=near):
        load_metrics(tmp_path, factors=[factor])


def test_spectra_and_scalars(tmp_path, make_run):
    record = make_run(tmp_path / "r")
    store = RunStore(tmp_path / "r", record.run_id)
    values = np.array([2.0, 1.0, 0.5], dtype=np.float32)
    spectrum = {"step": 0, "layer": 0, "ffn": "ffn", "site": "pre", "eigenvalues": values}
    store.append_spectra([spectrum, {**spectrum, "site": "post"}])
    store.flush(0)
    spectra = load_spectra(tmp_path, factors=["activation.name"])
    assert list(spectra["site"]) == ["pre", "post"]
    assert list(spectra["activation.name"]) == ["gelu", "gelu"]
    assert spectra["eigenvalues"][0].dtype == np.float32
    np.testing.assert_array_equal(spectra["eigenvalues"][0], values)
    scalars = load_scalars(tmp_path)
    assert list(scalars["value"]) == [4.0, 3.0]
    assert list(scalars["name"].unique()) == ["train_loss"]
    assert list(scalars["run_status"].unique()) == ["running"]


def test_a_run_without_rows_is_named(tmp_path, make_run):
    make_run(tmp_path / "a")
    empty = make_run(tmp_path / "b", steps=())
    with pytest.warns(IncompleteWarning, match=f"Runs without metrics: {empty.run_id}"):
        metrics = load_metrics(tmp_path)
    assert len(metrics) == 4
    with pytest.warns(IncompleteWarning, match="without spectra"):
        spectra = load_spectra(tmp_path, factors=["seed"])
    assert list(spectra.columns)[-3:] == ["run_status", "n_damaged_parts", "seed"]
    assert len(spectra) == 0


def test_a_damaged_part_is_named_at_the_callers_line(sweep, tmp_path):
    part = sorted((tmp_path / "sweep" / "b" / "metrics").iterdir())[0]
    part.write_bytes(b"PAR1")
    with pytest.warns(DamagedPartWarning, match=str(part)) as caught:
        metrics = load_metrics(tmp_path)
    assert len(metrics) == 10
    assert caught[0].filename == __file__


def test_a_part_with_one_changed_byte_in_a_page_is_named(sweep, tmp_path):
    part = sorted((tmp_path / "sweep" / "b" / "metrics").iterdir())[0]
    chunk = pq.read_metadata(part).row_group(0).column(METRICS_SCHEMA.names.index("se_pre"))
    content = bytearray(part.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    part.write_bytes(content)
    assert len(pq.read_table(part)) == 2  # unverified, it reads
    with pytest.warns(DamagedPartWarning, match=str(part)):
        metrics = load_metrics(tmp_path)
    assert len(metrics) == 10


def test_parts_that_could_not_be_read_are_counted(sweep, tmp_path):
    for part in (tmp_path / "sweep" / "b" / "metrics").iterdir():
        damaged = part
    damaged.write_bytes(b"PAR1")
    with pytest.warns(DamagedPartWarning):
        metrics = load_metrics(tmp_path)
    counts = metrics.groupby("run_id", sort=False)["n_damaged_parts"].unique().str[0]
    assert list(counts) == [0, 1, 0]


def test_metrics_of_a_newer_nerve_are_left_out_and_named(sweep, tmp_path):
    """One run of a later version does not prevent reading the others."""
    part = sorted((tmp_path / "sweep" / "b" / "metrics").iterdir())[0]
    table = pq.read_table(part)
    pq.write_table(table.replace_schema_metadata({"nerve_schema_version": "3"}), part)
    with pytest.warns(IncompleteWarning) as caught:
        metrics = load_metrics(tmp_path)
    assert len(metrics) == 8
    assert [str(w.message).split(":")[0] for w in caught] == ["Left out", "Runs without metrics"]
    assert f"{part} has version 3. Install" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_runs_parse_each_record_once_whatever_is_asked_of_them(sweep, tmp_path, monkeypatch):
    """And their frames equal those of the loaders, each created once."""
    store = RunStore(tmp_path / "sweep" / "a", sweep[0].run_id)
    spectrum = {"step": 0, "layer": 0, "ffn": "ffn", "site": "pre", "eigenvalues": [1.0, 0.5]}
    store.append_spectra([spectrum])
    store.flush(0)
    load, read = RunRecord.load, []
    monkeypatch.setattr(RunRecord, "load", lambda path: read.append(path) or load(path))
    runs = Runs(tmp_path, factors=["ffn.width"])
    with pytest.warns(IncompleteWarning, match="without spectra"):
        frames = (runs.frame, runs.metrics, runs.spectra, runs.scalars, runs.flags)
    assert frames == (runs.frame, runs.metrics, runs.spectra, runs.scalars, runs.flags)
    assert read == [record.directory for record in sweep]
    assert len(runs) == 3
    pd.testing.assert_frame_equal(runs.frame, load_runs(tmp_path))
    pd.testing.assert_frame_equal(runs.metrics, load_metrics(tmp_path, ["ffn.width"]))
    pd.testing.assert_frame_equal(runs.scalars, load_scalars(tmp_path, ["ffn.width"]))
    pd.testing.assert_frame_equal(runs.flags, flag_runs(runs.metrics, runs.frame))


def test_omissions_are_warned_about_once_at_the_callers_line(tmp_path, make_run):
    """Faults of records where the runs are loaded, those of rows on their first access, also if
    another frame needs them; each at a line of this file."""
    for name, corpus in (("a", "py311"), ("b", "py312"), ("c", "py312")):
        make_run(tmp_path / name, fingerprints={"corpus": corpus})
    (tmp_path / "c" / "run.json").write_text("{")
    next((tmp_path / "b" / "metrics").iterdir()).write_bytes(b"PAR1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        here = sys._getframe().f_lineno
        runs = Runs(tmp_path)
        _ = runs.flags
        _ = runs.metrics, runs.frame, runs.flags
        _ = [runs.spectra]
    assert [(each.category, each.lineno - here, each.filename) for each in caught] == [
        (DamagedRecordWarning, 1, __file__),
        (FingerprintWarning, 1, __file__),
        (DamagedPartWarning, 2, __file__),
        (IncompleteWarning, 4, __file__),
    ]


def test_no_runs(tmp_path):
    for loader in (load_runs, load_metrics, load_spectra, load_scalars):
        with pytest.raises(StoreError, match=r"run\.json"):
            loader(tmp_path)


def test_an_interrupted_compaction_changes_no_frame(tmp_path, make_run):
    """Both the compacted part and the others exist, as if the process died in between."""
    record = make_run(tmp_path, steps=(0, 10, 20))
    before = load_metrics(tmp_path)
    folder = tmp_path / "metrics"
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    store = RunStore(tmp_path, record.run_id)
    store.compact()
    pd.testing.assert_frame_equal(load_metrics(tmp_path), before)
    for name in sorted(kept)[:-1]:
        (folder / name).write_bytes(kept[name])
        doubled = load_metrics(tmp_path).sort_values(["step", "layer"], ignore_index=True)
        pd.testing.assert_frame_equal(doubled, before)
    RunStore(tmp_path, record.run_id)
    assert len(list(folder.iterdir())) == 1
    pd.testing.assert_frame_equal(load_metrics(tmp_path), before)


def test_a_value_with_the_name_of_a_result_is_a_factor_inside_a_group(tmp_path, make_run):
    """As the error says for a bare name; a bare name of another dataset is allowed."""
    for lr in (1e-4, 2e-4):
        make_run(tmp_path / str(lr), {"lr": lr, "optimizer": {"lr": lr}})
    with pytest.raises(ConfigError, match=r'got \'lr\'\. .* config=\{"group": \{"lr": …\}\} gives'):
        load_metrics(tmp_path, factors=["lr"])
    assert set(load_scalars(tmp_path, factors=["lr"])["lr"]) == {1e-4, 2e-4}
    assert set(load_metrics(tmp_path, factors=["optimizer.lr"])["optimizer.lr"]) == {1e-4, 2e-4}


def test_a_value_with_the_name_of_a_recorded_one_is_beside_it_and_is_a_factor(tmp_path, make_run):
    """`device` is in many a configuration."""
    for host in ("a", "b"):
        config = {"device": "cuda", "host": host, "final": {"x": 1}, "config": {"x": 2}}
        make_run(tmp_path / host, config)
    runs = load_runs(tmp_path)
    assert runs["device"].isna().all()
    assert runs["config.device"].tolist() == ["cuda", "cuda"]
    assert runs["config.host"].tolist() == ["a", "b"]
    assert (runs["host"] == socket.gethostname()).all()
    assert runs["final.x"].tolist() == [1, 1]
    assert find_factors(runs).varying == ("config.host",)


@pytest.mark.parametrize(
    ("config", "columns"),
    [
        (
            {"config": {"device": 1}, "device": 2},
            {"config.device": 1, "config.config.device": 2},
        ),
        ({"a.b": 1, "a": {"b": 2, "c": 3}}, {"a.b": 1, "config.a.b": 2, "a.c": 3}),
        ({"a": {"b": {"c": 1}, "b.c": 2}}, {"a.b.c": 1, "config.a.b.c": 2}),
        ({"seed": "first"}, {"config.seed": "first"}),
        ({"seed": True}, {"config.seed": True}),
    ],
)
def test_no_value_of_a_stored_configuration_is_lost(
    tmp_path, make_run, monkeypatch, config, columns
):
    """Earlier versions stored two values with one name, which are refused now."""
    monkeypatch.setattr("nerve.storage.record.require_columns", lambda _: None)
    make_run(tmp_path, config)
    (row,) = load_runs(tmp_path).to_dict("records")
    assert {name: row[name] for name in columns} == columns


def test_seeds_that_are_not_integers_are_not_a_factor(tmp_path, make_run):
    for seed in ("first", "second"):
        make_run(tmp_path / seed, {"seed": seed, "width": len(seed)})
    assert find_factors(load_runs(tmp_path)).varying == ("width",)


def test_reading_needs_no_torch(tmp_path, make_run):
    """A report starts immediately: torch, Lightning and Hydra are not imported."""
    make_run(tmp_path)
    code = (
        "import sys; from nerve import load_metrics, RunStore, RunRecord;"
        f"RunStore({str(tmp_path)!r}, RunRecord.load({str(tmp_path)!r}).run_id).compact();"
        f"assert len(load_metrics({str(tmp_path)!r})) == 4;"
        "print({'torch', 'lightning', 'hydra', 'omegaconf'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_path_that_is_not_valid_unicode_is_escaped(tmp_path, make_run):
    """Linux allows arbitrary bytes in a name, for example from an archive of another system."""
    directory = tmp_path / os.fsdecode(b"\xe9t\xe9")
    make_run(directory, {"seed": 0, "data": {"path": str(directory)}})
    runs = load_runs(tmp_path)
    name = f"{tmp_path}/\\udce9t\\udce9"
    assert runs["directory"].tolist() == runs["data.path"].tolist() == [name]
    assert set(load_metrics(tmp_path, factors=["data.path"])["data.path"]) == {name}


def test_two_hundred_runs_load_quickly(tmp_path, make_run, row):
    """0.4 s on a busy core; reading row by row or comparing runs pairwise would take minutes."""
    record = make_run(tmp_path / "0", steps=())
    store = RunStore(tmp_path / "0", record.run_id)
    store.append_metrics(row(step, layer) for step in range(10) for layer in range(12))
    store.flush(10)
    table = read_part(next((tmp_path / "0" / "metrics").iterdir()), DATASETS["metrics"])
    ids = table.column_names.index("run_id")
    text = (tmp_path / "0" / "run.json").read_text()
    for index in range(1, 200):
        folder = tmp_path / str(index) / "metrics"
        folder.mkdir(parents=True)
        own = pa.array([f"{index:08d}"] * len(table))
        pq.write_table(table.set_column(ids, "run_id", own), folder / "part-000000000010.parquet")
        renamed = re.sub('"checksum": "[0-9a-f]*"', '"checksum": null', text)
        renamed = renamed.replace(record.run_id, f"{index:08d}")
        (folder.parent / "run.json").write_text(renamed)
    started = pd.Timestamp.now()
    assert len(load_metrics(tmp_path)) == 200 * 120
    assert (pd.Timestamp.now() - started).total_seconds() < 5


def test_runs_of_earlier_versions_share_ids_with_those_of_today(tmp_path, make_run):
    """Ids are computed from what was stored; an infinite value is also infinite in the frame."""
    config = {"data": {"_target_": "now.here.Data"}, "monitor": {"skip_first": 0}, "clip": math.inf}
    before = {"data": {"_target_": "once.there.Data"}, "monitor": {}, "clip": math.inf}
    for name, values, seed in (("now", config, 1), ("before", before, 1), ("other", before, 2)):
        make_run(tmp_path / name, {**values, "seed": seed}, seed=seed)
    path = tmp_path / "before" / "run.json"
    changed = {"config_id": "0123456789ab", "checksum": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    runs = load_runs(tmp_path)
    assert set(runs.loc[runs["seed"] == 1, "config_id"]) == {config_id({**config, "seed": 1})}
    assert set(runs["design_id"]) == {config_id(config)}
    assert set(runs["clip"]) == {math.inf}


def test_runs_read_a_few_at_once_are_as_read_all_at_once(tmp_path, make_run, row, monkeypatch):
    """Rows in the order of the runs, each with columns derived from it and from its own groups,
    including a run without rows and one with two parts."""
    for i in range(5):
        record = make_run(tmp_path / str(i), {"a": f"text {i}"}, steps=() if i == 2 else (0, 10))
        if i == 3:
            store = RunStore(record.directory, record.run_id)
            store.append_groups(HALVES)
            store.append_metrics([row(20, 0)])
            store.flush(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IncompleteWarning)
        whole = load_metrics(tmp_path, factors=["a"])
        monkeypatch.setattr(gather, "MOST_AT_ONCE", 2)
        pd.testing.assert_frame_equal(load_metrics(tmp_path, factors=["a"]), whole)
    assert list(whole["a"].unique()) == ["text 0", "text 1", "text 3", "text 4"]
    by_halves = (whole["a"] == "text 3") & (whole["step"] == 20)
    assert (whole["sampling"] == np.where(by_halves, "severely under", "well")).all()


def test_strings_are_categories_that_behave_like_strings(sweep, tmp_path):
    """In the operations that notebooks use: groups, merges, comparisons, pivots, sorting."""
    metrics = load_metrics(tmp_path, factors=["normalization.kind"])
    texts = metrics.astype(
        {name: object for name, kind in metrics.dtypes.items() if kind == "category"}
    )
    for by in (["run_id"], ["ffn", "step"], ["normalization.kind", "status"]):
        own, plain = (
            each.groupby(by, observed=True)["pr_post"].mean() for each in (metrics, texts)
        )
        assert list(own) == list(plain)
        assert list(own.index) == list(plain.index)
    runs = load_runs(tmp_path)
    columns = ["run_id", "normalization.kind", "seed"]
    own, plain = (each[["run_id", "step"]].merge(runs[columns]) for each in (metrics, texts))
    assert (own == plain).all(axis=None)
    assert (metrics["ffn"] == "ffn").all()
    assert metrics["status"].isin(["ok"]).all()
    assert metrics["outliers"].str.contains("pre").sum() == 0
    first = metrics["run_id"].iloc[0]
    one = metrics[metrics["run_id"] == first]
    assert list(one.groupby("run_id", observed=True).groups) == [first]
    layers = metrics.pivot_table(index="run_id", columns="layer", values="pr_post", observed=True)
    assert len(layers) == metrics["run_id"].nunique()
    ordered = metrics.sort_values("normalization.kind", kind="stable")
    assert list(ordered["normalization.kind"]) == sorted(metrics["normalization.kind"])


@pytest.mark.parametrize("name", ["pr_gain", "exp_se_pre", "sampling", "n_damaged_parts"])
def test_a_factor_cannot_replace_a_column_that_is_derived(tmp_path, make_run, name):
    make_run(tmp_path / "a", {name: 3})
    with pytest.raises(ConfigError, match=f"got '{name}'"):
        load_metrics(tmp_path, [name])


@pytest.mark.parametrize("name", ["group", "site", "dim", "pr_spread"])
def test_a_factor_may_have_the_name_of_a_column_of_another_dataset(tmp_path, make_run, name):
    """Groups have it, metrics do not: only the dataset that is asked for must not."""
    for value in ("a", "b"):
        store = RunStore(tmp_path / value, make_run(tmp_path / value, {name: value}).run_id)
        store.append_groups(HALVES)
        store.flush(20)
    assert load_metrics(tmp_path, [name])[name].unique().tolist() == ["a", "b"]
    runs = Runs(tmp_path, [name])
    assert runs.metrics["sampling"].notna().all()
    with pytest.raises(ConfigError, match=rf"groups does not already have; got '{name}'"):
        _ = runs.groups
    assert load_groups(tmp_path, ["run_status", "config_id"])["config_id"].nunique() == 2


def test_a_factor_of_groups_may_have_the_name_of_a_column_of_metrics(tmp_path, make_run):
    store = RunStore(tmp_path / "a", make_run(tmp_path / "a", {"js": 3}).run_id)
    store.append_groups(HALVES)
    store.flush(20)
    assert load_groups(tmp_path, ["js"])["js"].tolist() == [3] * len(HALVES)
    with pytest.raises(ConfigError, match="metrics does not already have; got 'js'"):
        load_metrics(tmp_path, ["js"])


def plain_row(config: dict) -> dict:
    """The leaves of a configuration by their dotted names, one by one."""
    row = {}
    todo = [*config.items()][::-1]
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{name}.{key}", item) for key, item in value.items()][::-1]
        else:
            row[name] = json.dumps(value) if isinstance(value, list) else value
    return row


@pytest.mark.parametrize("most", [1, 3, 4096])
def test_rows_are_those_of_each_configuration_whatever_others_have(
    tmp_path, make_run, monkeypatch, most
):
    """Groups that are equal, that only look equal, and that lack keys which were added later; more
    of them than are remembered."""
    monkeypatch.setattr(run_rows, "_MOST_LEAVES", most)
    of_nerve_run = {group: {"x": 1} for group in ORIGINAL_GROUPS}
    values = [{"x": 1}, {"x": True}, {"x": 1.0}, {"x": "1"}, {"x": None}, {"x": [1]}, {}, 1, "1"]
    configs = [{"a": value, "b": {"c": {"d": i % 2}}} for i, value in enumerate(values * 2)]
    configs += [{**of_nerve_run, "monitor": {"x": 1, **more}} for more in ({}, {"skip_first": 5})]
    configs += [{**of_nerve_run, "regularizer": value} for value in (None, {"name": "rank"})]
    configs += [{"monitor": {"x": 1}}, {"regularizer": None}]  # not of nerve-run
    for i, config in enumerate(configs):
        make_run(tmp_path / f"{i:02d}", config, steps=())
    runs = load_runs(tmp_path)
    expected = [plain_row(dict(completed(config))) for config in configs]
    names = list(dict.fromkeys(name for row in expected for name in row))
    assert [name for name in runs.columns if name in names] == names
    for name in names:
        for found, row in zip(runs[name], expected, strict=True):
            value = row.get(name)
            assert pd.isna(found) if value is None else found == value
    assert [type(value) for value in runs["a.x"][:6]] == [int, bool, float, str, type(None), str]
    assert runs["monitor.skip_first"].dropna().tolist() == [0, 5, 0, 0]
    assert runs["regularizer.name"].dropna().tolist() == ["none", "none", "rank"]
