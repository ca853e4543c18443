"""A Lightning callback that holds runs for as long as a test needs them."""

import os
import select
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L

PAUSE_S = 4.0
"""Long enough that no run ends while it is held, which takes up to two and a half minutes."""
LOOKS_EVERY_S = 0.1
HELD_FROM = 20


class Brake(L.Callback):
    """From step 20 each step takes seconds longer, until the file `<folder>/release` appears or the
    process gets a signal. After a signal no step is held any more: several processes obey one only
    at the step at which they next exchange their wishes.

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
        self._is_signaled = False
        self._signals, self._wake = os.pipe()
        os.set_blocking(self._wake, False)

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._began_at = trainer.global_step
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step <= HELD_FROM:
            return
        if self._began_at is not None and trainer.is_global_zero:
            with open(self._folder / str(self._seed), "a") as file:
                file.write(f"{self._began_at} {_job()} {os.getpid()}\n")
            self._began_at = None
        until = time.monotonic() + PAUSE_S
        while not (self._is_signaled or self._is_released()) and time.monotonic() < until:
            self._is_signaled = bool(select.select([self._signals], [], [], LOOKS_EVERY_S)[0])
        if self._is_released() and self._seed == self._unlucky:
            raise RuntimeError("this run has no luck")

    def _is_released(self) -> bool:
        return (self._folder / "release").exists()


def _job() -> str:
    """The name in squeue and scontrol."""
    of_array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if of_array is None:
        return os.environ["SLURM_JOB_ID"]
    return f"{of_array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
