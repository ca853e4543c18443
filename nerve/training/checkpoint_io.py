"""When a run saves through Lightning, and which files only the run may write."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import CheckpointIO

from nerve.config import require, require_count, require_reached, require_steps
from nerve.storage.directory import RunDirectory
from nerve.training.checkpoint_files import read_checkpoint, write_checkpoint


@dataclass(frozen=True)
class CheckpointCadence:
    """When a run saves, in addition to its end and to when it is asked to stop. If both intervals
    are set, whichever is reached first counts.

    Attributes:
        every_n_steps: optimizer steps between checkpoints; None for no such limit.
        every_n_minutes: minutes between checkpoints; None for no such limit.
        keep: optimizer steps whose weights are kept permanently; 0 is before training.

    Raises:
        ConfigError: for values that are not positive, and for steps that are not integers.
    """

    every_n_steps: int | None = None
    every_n_minutes: int | float | None = None
    keep: list = field(default_factory=list)

    def __post_init__(self) -> None:
        require_count("checkpoint.every_n_steps", self.every_n_steps, or_null=True)
        minutes = self.every_n_minutes
        require(
            minutes is None or (isinstance(minutes, int | float) and minutes > 0),
            f"checkpoint.every_n_minutes must be null or a positive number; got {minutes!r}.",
        )
        require_steps("checkpoint.keep", self.keep, or_empty=True)

    def require_reached(self, max_steps: int) -> None:
        """Raises `ConfigError` for steps to keep that a run of `max_steps` steps never reaches."""
        require_reached("checkpoint.keep", self.keep, max_steps)

    def is_due_at(self, step: int) -> bool:
        """Whether to save after `step`, regardless of the time."""
        return bool(self.every_n_steps) and step % (self.every_n_steps or 1) == 0

    def is_due_after(self, seconds: float) -> bool:
        """Whether to save `seconds` after the last checkpoint, regardless of the step."""
        return bool(self.every_n_minutes) and seconds >= 60 * (self.every_n_minutes or 0)


def require_other_files(callbacks: Sequence[L.Callback], run: RunDirectory) -> None:
    """Rejects Lightning callbacks that would overwrite the checkpoints of `run`.

    Raises:
        ConfigError: names the file.
    """
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        folder = Path(callback.dirpath or run.checkpoint("last").parent)
        # Only the directory and the pattern matter, so any step will do.
        paths = [Path(callback.format_checkpoint_name({"step": torch.tensor(0)}))]
        if callback.save_last:
            paths.append(Path(callback.CHECKPOINT_NAME_LAST + callback.FILE_EXTENSION))
        for path in paths:
            _require_other(folder / path, run, f"{type(callback).__name__} would write it")


def _require_other(path: Path, run: RunDirectory, who: str) -> None:
    """Raises `ConfigError` where `path` is a checkpoint that the run itself writes."""
    is_within = path.parent.resolve() == run.checkpoint("last").parent.resolve()
    require(
        not (is_within and re.fullmatch(r"(last|best|step-\d{12})\.ckpt", path.name)),
        "Only the run itself may write its last, best and kept checkpoints; "
        f"{path} is one of them, and {who}. Give that callback another name or dirpath, or "
        "omit it: checkpoint.every_n_steps and checkpoint.keep determine when the run saves.",
    )


class CheckpointFiles(CheckpointIO):
    """Lightning's plugin for checkpoint files: holds what Lightning saves until `write` is called.

    A state is taken where Lightning can resume from it, and written once all rows up to its step
    are known. Other callbacks may save to their own files, but not to the run's.
    """

    def __init__(self) -> None:
        self._held: dict[Path, dict[str, Any]] = {}
        self._own: RunDirectory | None = None
        self._takes = False

    def reserve(self, run: RunDirectory) -> None:
        """From now on, the checkpoints of `run` may only be saved within `taking`."""
        self._own = run

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Within the `with` block, Lightning may save the run's own checkpoints."""
        self._takes = True
        try:
            yield
        finally:
            self._takes = False

    @property
    def holds(self) -> bool:
        """Whether there is something to write."""
        return bool(self._held)

    def write(self) -> None:
        """Writes what is held. Raises like `write_checkpoint`; what was not written stays held."""
        for path in list(self._held):
            write_checkpoint(path, self._held[path])
            del self._held[path]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if self._own is not None and not self._takes:
            _require_other(Path(path), self._own, "something else saves there")
        self._held[Path(path)] = checkpoint

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        self._held.pop(Path(path), None)
        Path(path).unlink(missing_ok=True)
