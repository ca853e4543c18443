"""Checkpoint files are complete or absent, never run code, and give users their trained model."""

import contextlib
import errno
import os
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import nerve
from nerve.errors import ConfigError, StoreError
from nerve.models import build_model
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.training.checkpoint_files import (
    check_checkpoint,
    drop_all_but_weights,
    identity_of,
    read_checkpoint,
    weights_of,
    write_checkpoint,
)
from nerve.training.checkpoint_io import CheckpointFiles

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
    """An object whose pickle calls a function that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def lightning_checkpoint(model: torch.nn.Module) -> dict:
    """The relevant part of the dictionary that Lightning saves."""
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
    """From weights alone and from a full checkpoint; another seed would give other weights."""
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
    """In torch's format and as a bare pickle, each with an object that would create a directory."""
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


@pytest.mark.parametrize("mask", [0x01, 0x40])
def test_a_changed_byte_anywhere_in_a_checkpoint_is_harmless_or_named(tmp_path, mask):
    """Flips single bits of tensors, of their metadata, and of the archive.

    Without verification, the same changes would silently load as other weights.
    """
    path = RunDirectory(tmp_path).checkpoint("last")
    write_checkpoint(path, {"model": {"w": torch.arange(400.0)}, "scores": [0.5] * 20, "step": 7})
    content, whole = path.read_bytes(), read_checkpoint(path)
    places = range(0, len(content), 11)
    n_named = n_silent = 0
    for place in places:
        changed = bytearray(content)
        changed[place] ^= mask
        path.write_bytes(changed)
        try:
            assert is_equal(read_checkpoint(path), whole), place
        except StoreError as error:
            n_named += "last.ckpt" in str(error)
            n_silent += loads_otherwise(path, whole)
    assert n_named > len(places) / 3
    assert n_silent > len(places) / 5


def is_equal(a: dict, b: dict) -> bool:
    return torch.equal(a["model"]["w"], b["model"]["w"]) and all(
        a[name] == b[name] for name in ("scores", "step")
    )


def loads_otherwise(path: Path, whole: dict) -> bool:
    """Whether torch alone loads the file as a checkpoint with other numbers."""
    try:
        return not is_equal(torch.load(path, weights_only=True), whole)
    except Exception:
        return False


def changed_weight(path: Path) -> None:
    """Flips one bit of the first weight."""
    content = bytearray(path.read_bytes())
    place = content.index(torch.full((50,), 7.25).numpy().tobytes()) + 2
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["best", "last", 100])
def test_a_model_with_a_changed_bit_is_not_loaded(tmp_path, kind):
    record = RunRecord.create(tmp_path, CONFIG)
    run, model = RunDirectory(tmp_path), build_model(CONFIG, seed=1, **DATA_DIMS)
    state = {name: torch.full_like(value, 7.25) for name, value in model.state_dict().items()}
    path = run.kept_checkpoint(kind) if kind == 100 else run.checkpoint(kind)
    asked = {"step": kind} if kind == 100 else {"which": kind}
    own = identity_of(record)
    write_checkpoint(path, {"model": state, "facts": DATA_DIMS, "step": 100, **own})
    nerve.load_model(tmp_path, **asked)
    changed_weight(path)
    with pytest.raises(StoreError, match=rf"{path.name} .* the checksum of .* does not match"):
        nerve.load_model(tmp_path, **asked)


@pytest.mark.parametrize("config", [CONFIG, {**CONFIG, "activation": {"name": "relu"}}])
@pytest.mark.parametrize("kind", ["best", "last", 100])
def test_weights_of_another_run_of_the_same_shapes_are_not_loaded(tmp_path, kind, config):
    """From a run with the same configuration, and from one in which the weights mean another
    function."""
    RunRecord.create(tmp_path / "run", CONFIG, "mine")
    other = RunRecord.create(tmp_path / "other", config, "its")
    run = RunDirectory(tmp_path / "run")
    path = run.kept_checkpoint(kind) if kind == 100 else run.checkpoint(kind)
    asked = {"step": kind} if kind == 100 else {"which": kind}
    whole = lightning_checkpoint(build_model(CONFIG, seed=1, **DATA_DIMS)) | {"global_step": 100}
    write_checkpoint(path, weights_of(whole | identity_of(other)))
    values = "the same values" if config == CONFIG else r"other values of activation\.name"
    with pytest.raises(StoreError, match=rf"{path.name} .* run its .* run mine .* {values}"):
        nerve.load_model(tmp_path / "run", **asked)


def test_a_run_goes_on_from_its_own_sound_checkpoint_alone(tmp_path):
    record = RunRecord.create(tmp_path / "run", CONFIG, "mine")
    other = RunRecord.create(tmp_path / "other", {**CONFIG, "seed": 2}, "its")
    path = RunDirectory(tmp_path / "run").checkpoint("last")
    whole = lightning_checkpoint(build_model(CONFIG, seed=1, **DATA_DIMS))
    whole["state_dict"]["model.first"] = torch.full((50,), 7.25)
    write_checkpoint(path, whole | identity_of(record))
    check_checkpoint(path, record)
    changed_weight(path)
    with pytest.raises(StoreError, match="the checksum of"):
        check_checkpoint(path, record)
    write_checkpoint(path, whole | identity_of(other))
    with pytest.raises(StoreError, match=r"run its .* run mine .* other values of seed"):
        check_checkpoint(path, record)
    write_checkpoint(path, whole)  # as version 0.1.0 wrote it
    check_checkpoint(path, record)
    write_checkpoint(path, weights_of(whole | identity_of(record)))  # its best, under this name
    with pytest.raises(StoreError, match="contains only weights"):
        check_checkpoint(path, record)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": {}, "facts": DATA_DIMS, "step": 1},
        {"model": {"w": torch.ones(2)}, "facts": DATA_DIMS, "step": 1},
        {"model": {}, "facts": {}, "step": 1},
        {"model": [], "facts": DATA_DIMS, "step": 1},
        {"state_dict": {}},
    ],
    ids=str,
)
def test_weights_of_another_model_are_not_loaded(tmp_path, content):
    """A valid checkpoint without a run id that does not fit: other shapes, or other code."""
    RunRecord.create(tmp_path, CONFIG)
    write_checkpoint(RunDirectory(tmp_path).checkpoint("best"), content)
    with pytest.raises(StoreError, match=r"best\.ckpt does not: "):
        nerve.load_model(tmp_path)


def test_a_record_of_other_code_has_no_model(tmp_path):
    RunRecord.create(tmp_path, {"lr": 0.1})
    weights = weights_of(lightning_checkpoint(build_model(CONFIG, seed=1, **DATA_DIMS)))
    write_checkpoint(RunDirectory(tmp_path).checkpoint("best"), weights)
    with pytest.raises(StoreError, match=r"best\.ckpt does not: KeyError: 'seed'"):
        nerve.load_model(tmp_path)


def test_weights_of_another_step_than_their_name_says_are_not_loaded(tmp_path):
    record = RunRecord.create(tmp_path, CONFIG)
    path = RunDirectory(tmp_path).kept_checkpoint(200)
    weights = weights_of(lightning_checkpoint(build_model(CONFIG, seed=1, **DATA_DIMS)))
    write_checkpoint(path, weights | identity_of(record) | {"step": 100})
    with pytest.raises(
        StoreError, match=r"step-000000000200\.ckpt contains the weights of step 100"
    ):
        nerve.load_model(tmp_path, step=200)


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
    """Of several kept steps, with other weights in the best and last checkpoints."""
    RunRecord.create(tmp_path, CONFIG)
    for which in ("best", "last"):
        other = build_model(CONFIG, seed=9, **DATA_DIMS)
        write_checkpoint(RunDirectory(tmp_path).checkpoint(which), lightning_checkpoint(other))
    trained = {step: build_model(CONFIG, seed=step, **DATA_DIMS) for step in (0, 100, 2000)}
    for step, model in trained.items():
        write_checkpoint(
            RunDirectory(tmp_path).kept_checkpoint(step),
            weights_of(lightning_checkpoint(model)) | {"step": step},
        )
    assert RunDirectory(tmp_path).kept_checkpoint(100).name == "step-000000000100.ckpt"
    assert RunDirectory(tmp_path).kept_steps() == [0, 100, 2000]
    for step, model in trained.items():
        loaded = nerve.load_model(tmp_path, step=step).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_a_step_that_was_not_kept_is_answered_with_those_that_were(tmp_path):
    RunRecord.create(tmp_path, CONFIG)
    with pytest.raises(StoreError, match=r"has none, not of step 7 .* checkpoint\.keep=\[7\]"):
        nerve.load_model(tmp_path, step=7)
    for step in (100, 0):
        write_checkpoint(RunDirectory(tmp_path).kept_checkpoint(step), {})
    RunDirectory(tmp_path).kept_checkpoint(7).with_suffix(".ckpt.0a1b.tmp").write_bytes(b"")
    with pytest.raises(StoreError, match="has those of 0, 100, not of step 7"):
        nerve.load_model(tmp_path, step=7)


@pytest.mark.parametrize("which", ["best", "last"])
def test_which_and_step_exclude_each_other(tmp_path, which):
    with pytest.raises(ConfigError, match=f"which='{which}' and step=0"):
        nerve.load_model(tmp_path, which, step=0)


@pytest.mark.parametrize("limit", [0, 100, 5000, 40_000])
@pytest.mark.parametrize(
    "write",
    [
        lambda path, files: write_checkpoint(path, {"w": torch.ones(30_000)}),
        lambda path, files: files.write(),
        lambda path, files: drop_all_but_weights(path),
    ],
    ids=["whole", "held", "weights alone"],
)
def test_a_disk_that_fills_while_a_checkpoint_is_written_is_told_as_that(tmp_path, limit, write):
    """At any point of the file, although torch replaces the error that its file raises."""
    path = RunDirectory(tmp_path).checkpoint("last")
    write_checkpoint(
        path, {"state_dict": {"w": torch.zeros(30_000)}, "facts": {}, "global_step": 1}
    )
    files, before = CheckpointFiles(), path.read_bytes()
    files.save_checkpoint({"w": torch.ones(30_000)}, path)
    with (
        full_after(limit),
        pytest.raises(StoreError, match=r"last\.ckpt cannot be written: .*Free up space"),
    ):
        write(path, files)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.ckpt"]


@contextlib.contextmanager
def full_after(n_bytes: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond a size, like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_wrong_with_the_content_is_not_told_as_a_full_disk(tmp_path):
    path = RunDirectory(tmp_path).checkpoint("last")
    with pytest.raises(TypeError, match="generator"):
        write_checkpoint(path, {"w": (i for i in range(3))})
    assert os.listdir(path.parent) == []


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
