"""Checkpoint files, from which a run is resumed and a model is loaded.

They are written atomically and contain only tensors, numbers, strings and containers of these, so
that reading one cannot run code. Each checkpoint names the run that wrote it. It is an archive with
a checksum for each of its files, which torch writes but does not verify; `read_checkpoint` does.
"""

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import torch
from torch import nn

from nerve.config import require, require_type
from nerve.errors import ConfigError, StoreError
from nerve.files import as_store_error, write_atomically
from nerve.models import build_model
from nerve.storage.directory import RunDirectory, Which
from nerve.storage.identity import differences
from nerve.storage.json_values import to_json
from nerve.storage.record import RunRecord
from nerve.storage.record_file import RECORD_NAME

_MODULE = "model."


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` to `path` atomically and durably.

    Raises:
        StoreError: when the file cannot be written; the previous file at `path` is then unchanged.
    """
    with as_store_error(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: _save(content, file))


def _save(content: Mapping[str, Any], file: BinaryIO) -> None:
    """Like `torch.save`, but raises the errors of `file` itself: torch replaces them with an error
    about an unexpected position."""
    noting = _Noting(file)
    try:
        torch.save(dict(content), noting)  # type: ignore[arg-type]  # it uses no other methods
    except Exception:
        if noting.refused is not None:
            raise noting.refused from None
        raise


class _Noting:
    """A file to write to that remembers the first error."""

    def __init__(self, file: BinaryIO) -> None:
        self.refused: OSError | None = None
        self._file = file

    def write(self, data: Any) -> int:
        return self._do(lambda: self._file.write(data))

    def flush(self) -> None:
        self._do(self._file.flush)

    def _do(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as error:
            self.refused = self.refused or error
            raise


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `write_checkpoint` wrote, with all tensors on the CPU.

    Raises:
        StoreError: when the file does not exist, is damaged (even in a single bit), or contains
            more than data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
        if changed is not None:
            raise ValueError(f"the checksum of {changed} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict):
            return content
        error: Exception = TypeError(f"it contains {type(content).__name__}")
    except Exception as refused:  # damaged bytes can make the unpickler raise anything
        error = refused
    raise StoreError(
        f"{path} must be a checkpoint that nerve wrote; it cannot be read: {error}. "
        "Restore it, or delete it: a run without a last checkpoint starts from the beginning."
    ) from error


def identity_of(record: RunRecord) -> dict[str, Any]:
    """What a checkpoint stores about the run that writes it: `run_id`, `config_id`, `config`."""
    return {
        "run_id": record.run_id,
        "config_id": record.config_id,
        "config": to_json(record.config),
    }


def check_checkpoint(path: Path, record: RunRecord) -> None:
    """Rejects a checkpoint from which `record`'s run cannot be resumed.

    Lightning does not read every checkpoint through `CheckpointFiles`: it reads sharded weights in
    another way.

    Raises:
        StoreError: like `read_checkpoint`, and for a checkpoint of another run or configuration, or
            one that contains only weights.
    """
    checkpoint = read_checkpoint(path)
    _require_own(checkpoint, record, path)
    if "state_dict" not in checkpoint:
        raise StoreError(
            "A run is resumed from its weights, optimizer state and all other states; "
            f"{path} contains only weights. Restore the run's own last checkpoint, or delete this "
            "one: a run without a last checkpoint starts from the beginning."
        )


def _require_own(checkpoint: Mapping[str, Any], record: RunRecord, path: Path) -> None:
    if "run_id" not in checkpoint:
        return  # version 0.1.0 did not store it
    different = differences(checkpoint["config"], record.config)
    if checkpoint["run_id"] == record.run_id and not different:
        return
    values = f"other values of {', '.join(different)}" if different else "the same values"
    raise StoreError(
        "A run directory must contain checkpoints of its own run; "
        f"{path} belongs to run {checkpoint['run_id']} "
        f"(configuration {checkpoint['config_id']}), and this is run {record.run_id} "
        f"(configuration {record.config_id}), with {values}. Restore the run's own checkpoint, or "
        "delete this one: a run without a last checkpoint starts from the beginning."
    )


def weights_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What is needed to load the model of a checkpoint: `model` (weights by name), `facts` (the
    model's dimensions that come from the data), `step`, and what `identity_of` returns."""
    if "state_dict" not in checkpoint:
        return dict(checkpoint)
    states = checkpoint["state_dict"]
    names = ("run_id", "config_id", "config")
    return {
        "model": {name.removeprefix(_MODULE): states[name] for name in states},
        "facts": checkpoint["facts"],
        "step": checkpoint["global_step"],
        **{name: checkpoint[name] for name in names if name in checkpoint},
    }


def step_of(path: Path) -> int:
    """The step of a checkpoint, which may be earlier than that of its run, if this has not ended or
    did not end well. Raises like `read_checkpoint`."""
    return int(weights_of(read_checkpoint(path))["step"])


def drop_all_but_weights(path: Path) -> None:
    """Reduces the checkpoint of a completed run to its weights, with AdamW a third of its size."""
    write_checkpoint(path, weights_of(read_checkpoint(path)))


def load_model(
    directory: str | os.PathLike[str], which: Which | None = None, *, step: int | None = None
) -> nn.Module:
    """Loads the model of a run, on the CPU and in eval mode.

    Args:
        directory: the run directory.
        which: `best` (default) for the weights with the lowest validation loss, `last` for those of
            the last checkpoint, which are the final weights once the run is done.
        step: instead of `which`, a step of `checkpoint.keep`.

    Raises:
        ConfigError: if both `which` and `step` are given, `which` is another string, or `step` is
            not an integer.
        StoreError: if there is no such run or checkpoint, or the checkpoint is damaged or belongs
            to another run or step.
    """
    require(
        which is None or step is None,
        f"Pass either which or step to load a model; got which={which!r} and step={step!r}. Omit "
        "one of them.",
    )
    require_type("step", step, int, NoneType)
    run = RunDirectory(directory)
    record = run.require_record()
    path = _kept(run, record, step) if step is not None else _saved(run, record, which or "best")
    checkpoint = read_checkpoint(path)
    _require_own(checkpoint, record, path)
    try:
        weights = weights_of(checkpoint)
        if step is not None and weights["step"] != step:
            raise StoreError(
                f"A file of kept weights is named after their step; {path} contains the weights of "
                f"step {weights['step']}. Rename it to that step, or restore the original file."
            )
        model = build_model(record.config, seed=record.config["seed"], **weights["facts"])
        model.load_state_dict(weights["model"])
    except (ConfigError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise StoreError(
            f"A checkpoint must contain the weights of the model that {RECORD_NAME} describes; "
            f"{path} does not: {why}. Restore it, or {RECORD_NAME}."
        ) from error
    return model.eval()


def _saved(run: RunDirectory, record: RunRecord, which: Which) -> Path:
    path = run.checkpoint(which)
    if not path.exists():
        raise StoreError(
            f"A model is loaded from a checkpoint; run {record.run_id} in {record.directory} has "
            f"no {path.name} (the run is {record.run_status}, at step {record.step}). Wait until "
            "it reaches its first checkpoint, or choose another run."
        )
    return path


def _kept(run: RunDirectory, record: RunRecord, step: int) -> Path:
    steps = run.kept_steps()
    if step not in steps:
        there = f"those of {', '.join(map(str, steps))}" if steps else "none"
        raise StoreError(
            f"A run keeps the weights of the steps in checkpoint.keep; run {record.run_id} in "
            f"{record.directory} has {there}, not of step {step!r} (the run is "
            f"{record.run_status}, at step {record.step}). Choose one of these, or start a new run "
            f"with checkpoint.keep=[{step}]."
        )
    return run.kept_checkpoint(step)
