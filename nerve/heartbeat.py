"""A Lightning callback that shows in run.json that the run is alive, and where it is."""

import time
from typing import Any

import lightning as L

from nerve.results.record import RunRecord

INTERVAL_S = 10.0


class Heartbeat(L.Callback):
    """Writes the step and the time to run.json at most every ten seconds.

    Args:
        record: the run's record.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._last = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        if trainer.is_global_zero and now - self._last >= INTERVAL_S:
            self._last = now
            self._record.update(step=trainer.global_step)  # every update is a heartbeat
