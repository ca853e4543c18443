"""Checkpoint files: whole or not there, never code, and a person's way to a trained model."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

import nerve
from nerve.errors import ConfigError, StoreError
from nerve.models import build_model
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.training.checkpoint_files import (
    CheckpointFiles,
    drop_all_but_weights,
    read_checkpoint,
    weights_of,
    write_checkpoint,
)

CONFIG = {
    "seed": 1,
    "model": {"kind": "gpt", "n_layers": 1, "d_model": 8, "n_heads": 2, "seq_len": 4},
    "normalization": {},
    "activation": {"name": "gelu"},
    "position": {"name": "learned"},
    "ffn": {"width": 2, "constraint": "weight_norm"},
}
DATA_DIMS = {"vocab_size": 7}


class Evil:
    """Pickles as a call that leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def lightning_checkpoint(model: torch.nn.Module) -> dict:
    """What matters of the dictionary that Lightning saves."""
    return {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "global_step": 5,
        "facts": DATA_DIMS,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(100)}}}],
    }


@pytest.mark.parametrize("step", [3.0, True, "3"])
def test_a_step_that_is_no_whole_number_is_refused(tmp_path, step):
    with pytest.raises(ConfigError, match="step must be a whole number or"):
        nerve.load_model(tmp_path, step=step)


@pytest.mark.parametrize("which", ["best", "last"])
@pytest.mark.parametrize("is_done", [True, False])
def test_a_model_is_loaded_as_it_was_saved(tmp_path, which, is_done):
    """From weights alone as from a whole checkpoint; another seed would give other weights."""
    trained = build_model({**CONFIG, "seed": 2}, seed=2, **DATA_DIMS)
    RunRecord.create(tmp_path, CONFIG)
    path = RunDirectory(tmp_path).checkpoint(which)
    write_checkpoint(path, lightning_checkpoint(trained))
    if is_done:
        drop_all_but_weights(path)
        assert set(read_checkpoint(path)) == {"model", "facts", "step"}
    model = nerve.load_model(tmp_path, which)
    tokens = torch.arange(4)[None]
    torch.testing.assert_close(model(tokens), trained.eval()(tokens), rtol=0, atol=0)
    assert not model.training
    for name, weight in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_weights_alone_are_smaller_and_taken_once(tmp_path):
    whole = lightning_checkpoint(build_model(CONFIG, seed=1, **DATA_DIMS))
    weights = weights_of(whole)
    assert weights["step"] == 5
    assert weights_of(weights) == weights


def test_what_is_saved_is_held_until_it_is_written(tmp_path):
    files, path = CheckpointFiles(), tmp_path / "checkpoints" / "last.ckpt"
    files.write()
    assert not files.holds
    files.save_checkpoint({"step": 1}, path)
    files.save_checkpoint({"step": 2}, path)
    assert files.holds
    assert not path.exists()
    files.write()
    assert not files.holds
    assert files.load_checkpoint(path) == {"step": 2}
    files.remove_checkpoint(path)
    files.remove_checkpoint(path)
    assert not path.exists()


def test_files_of_further_callbacks_are_written_too_unless_they_are_taken_back(tmp_path):
    files, paths = CheckpointFiles(), [tmp_path / f"{name}.ckpt" for name in "abc"]
    for path in paths:
        files.save_checkpoint({"at": path.name}, path)
    files.remove_checkpoint(paths[1])
    files.write()
    assert [path.exists() for path in paths] == [True, False, True]
    assert files.load_checkpoint(paths[0]) == {"at": "a.ckpt"}


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    """torch's format and a bare pickle, each with an object that would make a directory."""
    target = tmp_path / "made"
    path = RunDirectory(tmp_path).checkpoint("last")
    write_checkpoint(path, {"state_dict": {}, "callbacks": Evil(target)})
    with pytest.raises(StoreError, match=r"last\.ckpt"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil(target)))
    with pytest.raises(StoreError, match=r"last\.ckpt"):
        CheckpointFiles().load_checkpoint(path, weights_only=False)
    assert not target.exists()
    torch.load(write_evil(tmp_path, target), weights_only=False)
    assert target.exists()  # the test's own danger is real


def write_evil(folder: Path, target: Path) -> Path:
    path = folder / "evil.ckpt"
    write_checkpoint(path, {"callbacks": Evil(target)})
    return path


def test_a_damaged_checkpoint_is_named_wherever_it_is_cut(tmp_path):
    path = RunDirectory(tmp_path).checkpoint("last")
    write_checkpoint(path, lightning_checkpoint(build_model(CONFIG, seed=1, **DATA_DIMS)))
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"last\.ckpt .*Restore it, or delete it"):
            read_checkpoint(path)


def test_no_checkpoint_and_another_name_are_named(tmp_path):
    RunRecord.create(tmp_path, CONFIG)
    with pytest.raises(StoreError, match=r"has no best\.ckpt \(the run is running, at step 0\)"):
        nerve.load_model(tmp_path)
    with pytest.raises(ConfigError, match="must be one of best, last"):
        nerve.load_model(tmp_path, "first")


def test_the_weights_of_a_step_are_loaded_by_its_number(tmp_path):
    """Of several that are kept, beside a best and a last one that are others."""
    RunRecord.create(tmp_path, CONFIG)
    for which in ("best", "last"):
        other = build_model(CONFIG, seed=9, **DATA_DIMS)
        write_checkpoint(RunDirectory(tmp_path).checkpoint(which), lightning_checkpoint(other))
    trained = {step: build_model(CONFIG, seed=step, **DATA_DIMS) for step in (0, 100, 2000)}
    for step, model in trained.items():
        write_checkpoint(
            RunDirectory(tmp_path).kept_checkpoint(step), weights_of(lightning_checkpoint(model))
        )
    assert RunDirectory(tmp_path).kept_checkpoint(100).name == "step-000000000100.ckpt"
    assert RunDirectory(tmp_path).kept_steps() == [0, 100, 2000]
    for step, model in trained.items():
        loaded = nerve.load_model(tmp_path, step=step).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_step_that_was_not_kept_is_answered_with_those_that_were(tmp_path):
    RunRecord.create(tmp_path, CONFIG)
    with pytest.raises(StoreError, match=r"has none, not of 7 .* checkpoint\.keep=\[7\]"):
        nerve.load_model(tmp_path, step=7)
    for step in (100, 0):
        write_checkpoint(RunDirectory(tmp_path).kept_checkpoint(step), {})
    RunDirectory(tmp_path).kept_checkpoint(7).with_suffix(".ckpt.0a1b.tmp").write_bytes(b"")
    with pytest.raises(StoreError, match="has those of 0, 100, not of 7"):
        nerve.load_model(tmp_path, step=7)


@pytest.mark.parametrize("which", ["best", "last"])
def test_which_and_step_exclude_each_other(tmp_path, which):
    with pytest.raises(ConfigError, match=f"which='{which}' and step=0"):
        nerve.load_model(tmp_path, which, step=0)


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_refused_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, where):
    path = RunDirectory(tmp_path).checkpoint("last")
    write_checkpoint(path, {"step": 1})

    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    files = CheckpointFiles()
    files.save_checkpoint({"step": 2}, path)
    with monkeypatch.context() as patch:
        patch.setattr(where, refuse)
        with pytest.raises(StoreError, match="No space left"):
            files.write()
    assert read_checkpoint(path) == {"step": 1}
    assert os.listdir(path.parent) == ["last.ckpt"]
    files.write()
    assert read_checkpoint(path) == {"step": 2}
