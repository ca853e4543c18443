"""Shows, in `run.json`, that a run's process lives, and how far it has come."""

import atexit
import threading
from typing import Self

from nerve.errors import StoreError
from nerve.storage.record import RunRecord, now

EVERY_S = 10.0
"""Time between two writes of run.json."""


class Heartbeat:
    """Writes the record every ten seconds, within a `with` block, from a thread.

    Whatever the block does takes as long as it takes: preparing data, compiling, measuring a large
    model, validating. `heartbeat` shows that the process lives; `step` and `advanced`, that it gets
    somewhere. The thread has no reference to anything but the record, and a forked process has no
    such thread. It ends before Python shuts down, even if the block is still open.

    Args:
        record: the run's record.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record
        self._has_failed = threading.Event()
        self._has_ended = threading.Event()
        self._thread = threading.Thread(
            target=_beat,
            args=(record, self._has_failed, self._has_ended),
            name="heartbeat",
            daemon=True,  # a run that is left open does not keep the program from ending
        )

    def __enter__(self) -> Self:
        self._thread.start()
        atexit.register(self._stop)
        return self

    def __exit__(self, *exception: object) -> None:
        atexit.unregister(self._stop)
        self._stop()

    def _stop(self) -> None:
        self._has_ended.set()
        self._thread.join()

    def note_step(self, step: int) -> None:
        """Takes the step that the run has reached, which the next heartbeat writes.

        Raises:
            StoreError: if the last heartbeat could not be written, and it still cannot be.
        """
        self._record.step = step
        if self._has_failed.is_set():
            self._record.update()
            self._has_failed.clear()


def _beat(record: RunRecord, has_failed: threading.Event, has_ended: threading.Event) -> None:
    known = record.step
    while not has_ended.wait(EVERY_S):
        step = record.step
        changes = {} if step == known else {"advanced": now()}
        try:
            record.update(**changes)
        except StoreError:  # told by the run's own thread, at its next step or at its end
            has_failed.set()
        else:
            known = step
            has_failed.clear()
