"""How a run saves by way of Lightning: when, and which files are its own."""

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
    """When a run saves, beside its end and when it is asked to stop: at whichever is due first.

    Attributes:
        every_n_steps: optimizer steps from one checkpoint to the next; None for no such rule.
        every_n_minutes: minutes; None for no such rule.
        keep: optimizer steps after which the weights are kept for good; 0 is before training.

    Raises:
        ConfigError: for values that are not positive, and for steps that are not whole numbers.
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
        """Raises `ConfigError` for steps to keep that a run of `max_steps` steps does not do."""
        require_reached("checkpoint.keep", self.keep, max_steps)

    def is_due_at(self, step: int) -> bool:
        """Whether to save after `step`, whatever the time."""
        return bool(self.every_n_steps) and step % (self.every_n_steps or 1) == 0

    def is_due_after(self, seconds: float) -> bool:
        """Whether to save `seconds` after the last checkpoint, whatever the step."""
        return bool(self.every_n_minutes) and seconds >= 60 * (self.every_n_minutes or 0)


def require_other_files(callbacks: Sequence[L.Callback], run: RunDirectory) -> None:
    """Refuses callbacks of Lightning that would write over the checkpoints of `run`.

    Raises:
        ConfigError: with the file.
    """
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        folder = Path(callback.dirpath or run.checkpoint("last").parent)
        # Losses in a name are of no matter here; a step stands for all of them.
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
        f"What a run goes on from and its best and kept weights are written by the run alone; "
        f"{path} is the run's own file, and {who}. Give that callback another name or dirpath, or "
        "leave it out: checkpoint.every_n_steps and checkpoint.keep say when the run saves.",
    )


class CheckpointFiles(CheckpointIO):
    """Lightning's way to checkpoints: holds what it is given to save until `write` is called.

    A state is taken where Lightning can resume from it, and written where all rows up to its step
    are known. Further callbacks may save to files of their own, and to none of the run's.
    """

    def __init__(self) -> None:
        self._held: dict[Path, dict[str, Any]] = {}
        self._own: RunDirectory | None = None
        self._takes = False

    def reserve(self, run: RunDirectory) -> None:
        """From now on the checkpoints of `run` are saved within `taking` alone."""
        self._own = run

    @contextmanager
    def taking(self) -> Iterator[None]:
        """What Lightning saves within the `with` block is the run's."""
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
        """Writes what is held. Raises as `write_checkpoint`; what is not written is still held."""
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
