"""DuckDB and Polars read what runs stored: the two queries in the docs, and every column."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
from support import example

from nerve.storage.parts import read_parts
from nerve.storage.record import RunRecord
from nerve.storage.schema import DATASETS
from nerve.storage.store import RunStore

SPECTRA = {"pre": np.arange(12, 0, -1, dtype=np.float32), "post": np.ones(16, np.float32)}


@pytest.fixture
def outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., dict[str, Any]]
) -> Path:
    """Two designs of two seeds in a sweep, and a failed run, below the current directory.

    One run was killed while it was compacted, another while it wrote.
    """
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        write_run("gelu", seed, row, gain=1 + seed, val_loss=4.25 + seed)
        write_run("relu", seed, row, gain=10 * (1 + seed), val_loss=4.0 + seed)
    failed = RunRecord.create("outputs/failed", {"activation": {"name": "gelu"}, "seed": 0})
    store = RunStore(failed.directory, failed.run_id)
    store.append_metrics([row(0, 0, se_pre=None, status="dead")])
    store.flush(0)
    failed.finish("failed", ValueError("no memory"), step=0)
    interrupt_compaction(tmp_path / "outputs" / "sweep" / "gelu-0", "gelu0")
    part = next((tmp_path / "outputs" / "sweep" / "relu-0" / "metrics").glob("*.parquet"))
    part.with_name(f".{part.name}.0a1b2c3d.tmp").write_bytes(part.read_bytes()[:100])
    return tmp_path / "outputs"


def write_run(
    activation: str, seed: int, row: Callable[..., dict[str, Any]], gain: float, val_loss: float
) -> None:
    """Two steps of two layers; at the last step, the PR gain is `gain`, and twice that in layer
    1."""
    config = {"activation": {"name": activation}, "normalization": {"kind": "none"}, "seed": seed}
    directory = Path("outputs", "sweep", f"{activation}-{seed}")
    record = RunRecord.create(directory, config, f"{activation}{seed}", seed=seed)
    store = RunStore(directory, record.run_id)
    for step in (0, 10):
        for layer in range(2):
            pr_post = 2.0 * gain * (1 + layer) if step else 99.0
            store.append_metrics([row(step, layer, pr_post=pr_post, val_loss=val_loss)])
            for site, spectrum in SPECTRA.items():
                key = {"step": step, "layer": layer, "ffn": "ffn", "site": site}
                store.append_spectra([{**key, "eigenvalues": spectrum}])
                group = {"grouping": "halves", "group": "a", "n_samples": 9, "dim": 16}
                store.append_groups([{**key, **group, "pr": 2.0, "status": "ok"}])
        store.append_scalars([{"step": step, "name": "train_loss", "value": None}])
        store.flush(step)
    record.finish("done", step=10)


def interrupt_compaction(directory: Path, run_id: str) -> None:
    """Leaves the parts of a run in the state after a kill between their compaction and removal."""
    parts = {path: path.read_bytes() for path in directory.glob("*/*.parquet")}
    RunStore(directory, run_id).compact()
    removed = {path: part for path, part in parts.items() if not path.exists()}
    assert len(removed) == len(DATASETS)
    for path, part in removed.items():
        path.write_bytes(part)


def test_the_duckdb_query_of_the_pages(outputs):
    """Means over two seeds and two layers: gains of 1, 2, 2 and 4, and ten times these."""
    found = duckdb.sql(example("sql", "read_parquet")).fetchall()
    assert found == [("relu", "none", 2, 4.5, 22.5), ("gelu", "none", 2, 4.75, 2.25)]


def test_the_polars_query_of_the_pages(outputs):
    """Eight of twelve eigenvalues 12, 11, … hold 68/78 of their sum, eight of sixteen ones half."""
    names: dict[str, Any] = {}
    exec(example("python", "polars"), names)
    found = names["share"]
    assert found.columns == ["run_id", "layer", "ffn", "site", "share"]
    assert found["run_id"].to_list() == np.repeat(["gelu0", "gelu1", "relu0", "relu1"], 4).tolist()
    assert found["layer"].to_list() == [0, 0, 1, 1] * 4
    assert found["site"].to_list() == ["post", "pre"] * 8
    np.testing.assert_allclose(found["share"], [1 / 2, 68 / 78] * 8, rtol=1e-6)


@pytest.mark.parametrize("folder", ["val_loss=7", "pr_post=1", "step=0", "run_id=x", "layer=deep"])
def test_folders_that_look_like_columns_change_no_answer_of_the_pages(outputs, folder):
    """As with `hydra.sweep.subdir="lr=…"`: the stored values count, not the names of folders."""
    shutil.rmtree(outputs / "failed")
    (outputs / "sweep").rename(outputs / folder)
    test_the_duckdb_query_of_the_pages(outputs)
    test_the_polars_query_of_the_pages(outputs)


@pytest.mark.parametrize(
    ("folder", "key"),
    [
        ("lr=0.1", "lr"),
        ("lr=0.1/seed=3", "lr"),
        ("sweep/layer=3,seed=1", "layer"),
        ("name=a/run", "name"),
        ("eigenvalues=", "eigenvalues"),
    ],
)
def test_a_folder_that_other_readers_take_for_a_column_is_warned_of(tmp_path, caplog, folder, key):
    with caplog.at_level(logging.WARNING):
        RunStore(tmp_path / folder, "a")
    assert f"for the column {key} in" in caplog.text
    assert "hive_partitioning=false" in caplog.text


@pytest.mark.parametrize("folder", ["seed=3", "lr", "LR=3", "optimizer.lr=0.1", "=lr", "a"])
def test_any_other_folder_is_not_warned_of(tmp_path, caplog, folder):
    RunStore(tmp_path / folder, "a")
    assert caplog.text == ""


@pytest.mark.parametrize("name", list(DATASETS))
@pytest.mark.parametrize("run", ["gelu-0", "relu-0"])
def test_both_read_every_column_and_value_that_our_own_reader_reads(outputs, run, name):
    """Without duplicate rows, and cast to the schema, because both name some types differently."""
    directory, dataset = outputs / "sweep" / run, DATASETS[name]
    expected, damaged = read_parts(directory, dataset)
    assert not damaged
    order = [(key, "ascending") for key in dataset.key]
    pattern = f"{directory}/{name}/*.parquet"
    for found in (
        pl.read_parquet(pattern).unique().to_arrow(),
        duckdb.sql(f"SELECT DISTINCT * FROM read_parquet('{pattern}')").to_arrow_table(),
    ):
        assert found.schema.names == dataset.schema.names
        assert found.cast(dataset.schema).sort_by(order).equals(expected.sort_by(order))
