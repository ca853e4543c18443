"""Run directories that version 0.1.0 wrote are loaded, reported on, and resumed.

`of_version_0_1_0/` holds a run that was done after its 6 steps and one of the same values that got
SIGTERM in its fourth, each as that version left it (but the lock, and the last weights of the first
run, which no test needs), and their corpus. Written at commit e7261a1, in that folder, by

    nerve-run data=text_files data.corpus.paths=[corpus.jsonl] data.vocab_size=264 \\
        data.batch_size=2 data.val_fraction=0.2 model.n_layers=1 model.d_model=4 model.n_heads=1 \\
        model.seq_len=8 trainer.max_steps=6 trainer.log_every_n_steps=1 \\
        trainer.enable_progress_bar=false monitor.every_n_steps=2 monitor.n_tokens=64 threads=1 \\
        checkpoint.every_n_steps=1 hydra.run.dir=done
"""

import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

import nerve
from nerve.report.write import write_report
from nerve.storage.record import RunRecord

STORED = Path(__file__).with_name("of_version_0_1_0")
ADDED = [
    "variance_outside",
    *(f"{share}_share_{site}" for share in ("largest", "top", "mean") for site in ("pre", "post")),
]
"""Columns of metrics that a later version added."""


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """The current directory, with the two runs and their corpus, whose path is relative."""
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def stored(run: str, name: str) -> pd.DataFrame:
    """The only part of a dataset in the folder, read without nerve."""
    (part,) = (STORED / run / name).glob("*.parquet")
    assert pq.read_schema(part).metadata[b"nerve_schema_version"] == b"1"
    return pq.read_table(part).to_pandas()


def test_the_rows_are_loaded_unchanged_and_new_columns_are_null(copy):
    loaded = {
        "metrics": nerve.load_metrics(copy),
        "spectra": nerve.load_spectra(copy),
        "scalars": nerve.load_scalars(copy),
    }
    runs = nerve.load_runs(copy).set_index("run_id")
    assert sorted(runs["run_status"]) == ["done", "interrupted"]
    assert set(runs["versions.nerve"]) == {"0.1.0"}
    assert runs["config_id"].nunique() == 1
    assert set(runs["monitor.groups"]) == {"[]"}
    assert set(runs["regularizer.name"]) == {"none"}
    for name, frame in loaded.items():
        assert (frame["n_damaged_parts"] == 0).all()
        for run in ("done", "interrupted"):
            expected = stored(run, name)
            own = frame[frame["run_id"] == RunRecord.load(run).run_id].reset_index(drop=True)
            texts_too = own[list(expected)].astype(expected.dtypes)  # which are categories
            pd.testing.assert_frame_equal(texts_too, expected)
    assert loaded["metrics"][ADDED].isna().all(axis=None)


def test_a_report_is_written(copy):
    """Of one run and of both."""
    for path in ("interrupted", "."):
        write_report(path, copy / "report")
        assert "SE" in (copy / "report" / "index.html").read_text()
        shutil.rmtree(copy / "report")


def test_the_model_is_loaded(copy):
    model = nerve.load_model("done")
    logits = model(torch.zeros(1, 8, dtype=torch.long))
    assert logits.shape == (1, 8, 264)


def test_a_completed_run_is_left_unchanged(copy, run):
    before = Path("done/run.json").read_bytes()
    status, _, err = run("resume=done")
    assert status == 0, err
    assert Path("done/run.json").read_bytes() == before


def test_the_interrupted_run_is_resumed_to_the_result_of_the_other_one(copy, run):
    """It keeps its rows exactly. Later ones are those of the run that was never interrupted, to
    the digits that versions of torch and processors share."""
    before = {name: stored("interrupted", name) for name in ("metrics", "spectra", "scalars")}
    assert before["metrics"]["step"].max() == 4
    status, _, err = run("resume=interrupted", "checkpoint.keep=[5]")
    assert status == 0, err
    record = RunRecord.load("interrupted")
    assert (record.run_status, record.step, record.restarts) == ("done", 6, 1)
    for name, rows in before.items():
        frame = getattr(nerve, f"load_{name}")("interrupted")
        assert (frame["n_damaged_parts"] == 0).all()
        kept = frame[frame["step"] <= rows["step"].max()][list(rows)]
        kept = kept.merge(rows[list(KEYS[name])]).reset_index(drop=True)
        pd.testing.assert_frame_equal(kept.astype(rows.dtypes.to_dict()), rows)
    ours, theirs = nerve.load_metrics("interrupted"), nerve.load_metrics("done")
    assert ours["step"].tolist() == theirs["step"].tolist() == [0, 2, 4, 6]
    assert ours[ours["step"] <= 4][ADDED].isna().all(axis=None)
    for name in ("se_pre", "se_post", "pr_pre", "pr_post", "val_loss", "train_loss"):
        assert ours[name].tolist() == pytest.approx(theirs[name].tolist(), rel=1e-3, nan_ok=True)
    assert nerve.load_model("interrupted", step=5) is not None


KEYS = {
    "metrics": ("step", "layer", "ffn"),
    "spectra": ("step", "layer", "ffn", "site"),
    "scalars": ("step", "name"),
}
