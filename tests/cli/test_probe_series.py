"""A series of checkpoints is one run: each measured once, whatever happens in between."""

import shutil
import sys
import weakref
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from support import TINY_RUN
from trained import assert_same_run, llama, nerve_probe, probed, save, save_series

import nerve
from nerve.cli.probing import run as probing
from nerve.cli.probing.folders import Folders

STEPS = (0, 10, 20, 30, 40, 50, 60, 70)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps whose weights are loaded; at most one model is in memory."""
    steps: list[int] = []
    alive: list[weakref.ref] = []
    load = Folders.load

    def noting(self, checkpoint):
        assert not any(reference() for reference in alive)
        model = load(self, checkpoint)
        alive.append(weakref.ref(model))
        steps.append(checkpoint.step)
        return model

    monkeypatch.setattr(Folders, "load", noting)
    return steps


def test_the_kept_checkpoints_of_a_run_give_the_rows_that_it_wrote(run):
    """Five of them, on its own held-out data: metrics, losses and eigenvalues to 1e-10."""
    kept = "checkpoint.keep=[0,2,4,6,7]"
    where = ["trainer.max_steps=7", kept, "hydra.run.dir=trained", "monitor.skip_first=1"]
    where += ["monitor.groups=[frequency,halves]", "data.seq_len=8"]  # the model takes 16
    status, _, err = run(*TINY_RUN, *where)
    assert status == 0, err
    status, out, err = nerve_probe("trained", "-o", "probed")  # and its groups
    assert status == 0, err
    assert "steps: 5 (0, 2, 4, 6, 7)" in out
    own, got = (nerve.load_metrics(each) for each in ("trained", "probed"))
    unknown = ["train_loss", "lr"]
    columns = own.columns.drop(["run_id", *unknown])
    pd.testing.assert_frame_equal(got[columns], own[columns], rtol=1e-10, atol=0)
    assert len(own) == 10
    assert got[unknown].isna().all(axis=None)
    own, got = (nerve.load_spectra(each) for each in ("trained", "probed"))
    assert len(own) == len(got) == 20
    for ours, theirs in zip(own["eigenvalues"], got["eigenvalues"], strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=1e-12)  # stored as float32
    own, got = (nerve.load_groups(each).drop(columns="run_id") for each in ("trained", "probed"))
    pd.testing.assert_frame_equal(got, own, rtol=1e-10, atol=0)
    runs = nerve.load_runs(["trained", "probed"])
    same = ["normalization.kind", "activation.name", "seed", "unigram_loss", "fingerprints.heldout"]
    assert (runs[same].nunique() == 1).all()
    assert runs["config_id"].nunique() == 2
    for asked in (("--seq-len", 8), ("--steps", "1,2"), ("--text", "a.txt")):
        status, _, err = nerve_probe("trained", *asked)
        assert status == 1
        assert f"on its own held-out data; got {asked[0]}. Leave that out." in err


def test_a_run_without_kept_checkpoints_is_probed_at_its_last_one(run):
    assert run(*TINY_RUN, "hydra.run.dir=trained")[0] == 0
    status, _, err = nerve_probe("trained", "-o", "probed", "--layers", 1, "--skip-first", 2)
    assert status == 0, err
    rows = nerve.load_metrics("probed")
    assert rows[["step", "layer"]].to_numpy().tolist() == [[5, 1]]
    trained = nerve.load_metrics("trained")
    assert rows["val_loss"][0] == pytest.approx(trained["val_loss"].iloc[-1], rel=1e-10)
    assert rows["n_samples"][0] == trained["n_samples"].iloc[-1] / 16 * 14
    assert nerve_probe("trained", "probed")[0] == 1  # one at a time


def test_the_step_of_a_last_checkpoint_is_its_own(run, monkeypatch):
    """A run that failed or was killed was at a later step than its last checkpoint."""
    module = ModuleType("my_script")

    class Failing(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 5:
                raise RuntimeError("out of luck")

    module.Failing = Failing
    monkeypatch.setitem(sys.modules, "my_script", module)
    asked = ["trainer.max_steps=9", "checkpoint.every_n_steps=4", "hydra.run.dir=trained"]
    asked += ["+callbacks.failing._target_=my_script.Failing"]
    with pytest.raises(RuntimeError, match="out of luck"):
        run(*TINY_RUN, *asked)
    assert nerve.RunRecord.load("trained").step == 5
    status, out, err = nerve_probe("trained", "-o", "probed")
    assert status == 0, err
    assert "steps: 1 (4)" in out
    own, got = nerve.load_metrics("trained").query("step == 4"), nerve.load_metrics("probed")
    columns = own.columns.drop(["run_id", "train_loss", "lr", "run_status"])
    own = own[columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(got[columns], own, rtol=1e-10, atol=0)


def test_a_run_is_probed_without_its_callbacks_and_loggers(run, monkeypatch):
    """They may be missing on another machine."""
    module = ModuleType("my_script")
    module.Mine = type("Mine", (Callback,), {})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "my_script", module)
        mine = "+callbacks.mine._target_=my_script.Mine"
        assert run(*TINY_RUN, mine, "hydra.run.dir=trained")[0] == 0
    record = nerve.RunRecord.load("trained")
    wandb = {"wandb": {"_target_": "nerve.training.loggers.WandbLogger"}}
    record.update(config={**record.config, "logger": wandb})
    monkeypatch.setattr("nerve.cli.experiment.checks.find_spec", lambda name: None)
    status, _, err = nerve_probe("trained", "-o", "probed")
    assert status == 0, err
    kept = nerve.RunRecord.load("probed").config["callbacks"]
    assert kept == {"mine": {"_target_": "my_script.Mine"}}


def test_a_series_is_measured_once_and_continued_when_it_grows(loaded, monkeypatch):
    """Measured steps are not loaded again; an earlier step comes in between; the same rows as at
    once."""
    later = datetime.now(UTC) + timedelta(hours=1)  # when all files are old
    monkeypatch.setattr("nerve.storage.record.now", later.isoformat)
    save_series(STEPS[1:4])
    shutil.move("ckpt/step_20", "later_20")
    status, out, err = probed("ckpt/step_*")
    assert status == 0, err
    assert loaded == [10, 30]
    assert err.splitlines()[0] == "0/2 loading ckpt/step_10"
    del loaded[:]
    assert "steps: 2 (10, 30), of which 2" in probed("ckpt/step_*")[1]
    assert loaded == [10]  # what there is of FFNs and text is seen on the first
    del loaded[:]
    shutil.move("later_20", "ckpt/step_20")
    status, out, err = probed("ckpt/step_*")
    assert status == 0, err
    assert "steps: 3 (10, 20, 30), of which 2 were measured before" in out
    assert loaded == [10, 20]
    assert nerve.load_metrics("out")["run_id"].nunique() == 1
    assert nerve.RunRecord.load("out").step == 30
    shutil.move("out", "pieces")
    assert probed("ckpt/step_*")[0] == 0
    assert_same_run("pieces", "out")


def test_new_files_are_checked_and_different_weights_refused(loaded):
    save_series(STEPS[:2])
    assert probed("ckpt/step_*")[0] == 0
    before = nerve.load_metrics("out")
    for step in STEPS[:2]:
        save(llama(seed=step), Path(f"ckpt/step_{step}"))  # the same once more
    del loaded[:]
    assert probed("ckpt/step_*")[0] == 0
    assert loaded == [0, 10]
    save(llama(seed=5), Path("ckpt/step_10"))
    status, _, err = probed("ckpt/step_*")
    assert status == 1
    assert "step 10 was measured with different weights than ckpt/step_10 has now" in err
    assert nerve.load_metrics("out")["pr_post"].tolist() == before["pr_post"].tolist()


def test_another_model_in_a_series_leaves_those_before_it():
    save_series(STEPS[:3])
    save(llama(intermediate_size=48), Path("ckpt/step_10"))
    status, _, err = probed("ckpt/step_*")
    assert (status, "of one model; the FFNs of ckpt/step_10" in err) == (1, True)
    assert set(nerve.load_metrics("out")["step"]) == {0}
    assert nerve.RunRecord.load("out").run_status == "failed"
    save(llama(seed=10), Path("ckpt/step_10"))
    assert probed("ckpt/step_*")[0] == 0
    assert sorted(set(nerve.load_metrics("out")["step"])) == [0, 10, 20]
    assert nerve.RunRecord.load("out").run_status == "done"


@pytest.mark.parametrize("damaged", [[0], [10, 20]])
@pytest.mark.parametrize("is_empty", [False, True])
def test_damaged_checkpoints_are_named_and_the_others_measured(damaged, is_empty):
    """Whichever it is; the run is failed until they are restored or left out."""
    save_series(STEPS[:4])
    whole = [step for step in STEPS[:4] if step not in damaged]
    for step in damaged:
        folder = Path(f"ckpt/step_{step}")
        if is_empty:
            shutil.rmtree(folder)
            folder.mkdir()
        else:
            (folder / "model.safetensors").write_bytes(b"gone")
    status, out, err = probed("ckpt/step_*")
    assert status == 1
    (message,) = [line for line in err.splitlines() if line.startswith("nerve-probe: ")]
    assert f"{len(damaged)} of 4 are not, so" in message
    for step in damaged:
        assert f"step {step}: A model" in message
        assert f"ckpt/step_{step} " in message
    assert f"steps: {len(whole)} ({', '.join(map(str, whole))})\n" in out  # none before
    assert sorted(set(nerve.load_metrics("out")["step"])) == whole
    assert nerve.RunRecord.load("out").run_status == "failed"
    status, out, _ = probed(*(f"ckpt/step_{step}" for step in whole))
    assert (status, nerve.RunRecord.load("out").run_status) == (0, "done")
    assert f"of which {len(whole)} were measured before" in out
    for step in damaged:
        save(llama(seed=step), Path(f"ckpt/step_{step}"))
    assert probed("ckpt/step_*")[0] == 0
    assert sorted(set(nerve.load_metrics("out")["step"])) == [*STEPS[:4]]


def test_a_checkpoint_that_was_saved_in_part_does_not_stop_a_series():
    """Its folder has a part of the weights, and no tokenizer yet."""
    save_series(STEPS[:2])
    for path in Path("ckpt/step_0").glob("tokenizer*"):
        path.unlink()
    Path("ckpt/step_0/model.safetensors").write_bytes(b"begun")
    status, out, err = probed("ckpt/step_*")
    assert status == 1
    assert "1 of 2 are not" in err
    assert "steps: 1 (10)" in out
    save(llama(seed=0), Path("ckpt/step_0"))
    status, out, err = probed("ckpt/step_*")
    assert status == 0, err
    assert "steps: 2 (0, 10), of which 1 were measured before" in out


@pytest.mark.parametrize("diverged", [0, 10])
def test_a_checkpoint_that_has_diverged_does_not_stop_a_series(diverged):
    """No FFN can be found in it."""
    save_series(STEPS[:3])
    model = llama(seed=diverged)
    model.model.layers[0].mlp.gate_proj.weight.data[0, 0] = torch.nan
    save(model, Path(f"ckpt/step_{diverged}"))
    status, _, err = probed("ckpt/step_*")
    assert status == 1
    assert f"1 of 3 are not, so only the others are measured: step {diverged}: FFNs are" in err
    others = [step for step in STEPS[:3] if step != diverged]
    assert sorted(set(nerve.load_metrics("out")["step"])) == others
    assert nerve.RunRecord.load("out").run_status == "failed"


def test_a_measured_checkpoint_may_be_deleted(monkeypatch):
    """Also the first one, which otherwise shows the FFNs and the text."""
    later = datetime.now(UTC) + timedelta(hours=1)  # when all files are old
    monkeypatch.setattr("nerve.storage.record.now", later.isoformat)
    save_series(STEPS[:2])
    assert probed("ckpt/step_*")[0] == 0
    Path("ckpt/step_0/model.safetensors").unlink()
    status, out, err = probed("ckpt/step_*")
    assert status == 0, err
    assert "of which 2 were measured before" in out
    assert nerve.RunRecord.load("out").run_status == "done"


def test_a_series_of_which_nothing_can_be_loaded_fails_with_its_first_error():
    save_series(STEPS[:2])
    for step in STEPS[:2]:
        Path(f"ckpt/step_{step}/model.safetensors").write_bytes(b"gone")
    status, out, err = probed("ckpt/step_*")
    assert (status, out) == (1, "")
    assert "ckpt/step_0 cannot be read" in err
    assert not Path("out").exists()


def test_ctrl_c_leaves_what_is_measured(monkeypatch):
    save_series(STEPS[:3])
    measure_one, steps = probing.measure_one, []

    def interrupted(*model, step, **how):
        steps.append(step)
        if step == 20:
            raise KeyboardInterrupt
        return measure_one(*model, step=step, **how)

    monkeypatch.setattr(probing, "measure_one", interrupted)
    status, _, err = probed("ckpt/step_*")
    assert status == 130
    assert "nerve-probe: interrupted; repeat the command to continue" in err
    assert nerve.RunRecord.load("out").run_status == "interrupted"
    assert sorted(set(nerve.load_metrics("out")["step"])) == [0, 10]


def test_folders_can_be_given_one_by_one_with_their_steps():
    save_series(STEPS[:1])
    save(llama(seed=1), Path("final"))
    assert probed("final", "ckpt/step_0", "--steps", "99,7")[0] == 0
    rows = nerve.load_metrics("out")
    assert rows["step"].tolist() == [7, 7, 99, 99]
    own = nerve.measure(llama(seed=1), [{"input_ids": torch.zeros(1, 8, dtype=torch.int64)}])
    assert own["layer"].tolist() == rows["layer"].tolist()[:2]
