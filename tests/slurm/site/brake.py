"""A Lightning callback for runs that must be there for as long as a test needs them."""

import os
import time
from pathlib import Path
from typing import Any

import lightning as L

PAUSE_S = 1.0
HELD_FROM = 20


class Brake(L.Callback):
    """From step 20 each step takes a second longer until the file `<folder>/release` appears.

    Each start of training adds a line `<step> <job> <pid>` to `<folder>/<seed>`, with the step that
    it began from, once it is held.

    Args:
        folder: where these files are.
        seed: of this run.
        unlucky: the seed whose run raises when it is released.
    """

    def __init__(self, folder: str, seed: int, unlucky: int | None = None) -> None:
        self._folder = Path(folder)
        self._seed = seed
        self._unlucky = unlucky
        self._began_at: int | None = None

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._began_at = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step <= HELD_FROM:
            return
        if self._began_at is not None and trainer.is_global_zero:
            with open(self._folder / str(self._seed), "a") as file:
                file.write(f"{self._began_at} {_job()} {os.getpid()}\n")
            self._began_at = None
        if not (self._folder / "release").exists():
            time.sleep(PAUSE_S)
        elif self._seed == self._unlucky:
            raise RuntimeError("this run has no luck")


def _job() -> str:
    """As squeue and scontrol name it."""
    of_array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if of_array is None:
        return os.environ["SLURM_JOB_ID"]
    return f"{of_array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
