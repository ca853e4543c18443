"""The state of a run for each checkpoint of a Trainer, which identifies it only by its step."""

import json
import logging
from pathlib import Path
from typing import Any

from nerve.errors import StoreError
from nerve.files import write_atomically
from nerve.measuring.messages import gathered
from nerve.measuring.processes import rank
from nerve.storage.directory import CHECKPOINTS, RunDirectory

log = logging.getLogger(__name__)


class TrainerStates:
    """Keeps the state of a run at each step that a Trainer saves, in the run's own directory: the
    state is small, and the Trainer's checkpoints may be moved or deleted.

    Args:
        run: the run's directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Saves a state; all processes call it, and rank 0 writes."""
        if rank() == 0:
            path = self._path(step)
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, lambda file: file.write(json.dumps(state).encode()))

    def load(self, step: int) -> dict[str, Any] | None:
        """The state to resume from at a step, in every process; None if the run starts there.

        Raises:
            StoreError: if the run exists but has no checkpoint of that step.
        """
        found = self._found(step) if rank() == 0 else None
        state, refused = gathered(found)[0]
        if refused is not None:
            raise StoreError(refused)
        return state

    def _found(self, step: int) -> tuple[dict[str, Any] | None, str | None]:
        """The state, or the reason why there is none."""
        if step == 0:
            return None, None
        path = self._path(step)
        if path.is_file():
            return json.loads(path.read_text()), None
        if self._run.record is None:
            log.warning(
                "the run in %s begins at step %d of the Trainer; tokens_seen counts from there",
                self._run.path,
                step,
            )
            return None, None
        there = sorted(int(each.stem.partition("-")[2]) for each in path.parent.glob("trainer-*"))
        return None, (
            "A run can only be resumed from a checkpoint that the Trainer saved while it was "
            f"measured; {self._run.path} has the state of steps "
            f"{', '.join(map(str, there)) or 'none'}, and the Trainer resumes at step {step}. "
            "Resume from one of these, or record in another directory."
        )

    def _path(self, step: int) -> Path:
        return self._run.path / CHECKPOINTS / f"trainer-{step}.json"
