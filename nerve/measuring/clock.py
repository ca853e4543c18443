"""How long work takes on the host or a GPU, without waiting for it."""

import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any, Self

import torch


class Clock:
    """Adds up the time of `with` blocks; one within another counts once.

    On a GPU that is the time from one event to another in the stream of the model. They are read
    once both have passed, so that no block waits; only `seconds` does. A block whose work is
    captured into a CUDA graph has no time of its own and does not count.

    Args:
        device: where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._depth = 0
        self._began: Any = None
        self._passing: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        """The time of all blocks that have ended; waits until the device has done their work."""
        for event in chain.from_iterable(self._passing):
            if not event.query():
                event.synchronize()
        self._read()
        return self._seconds

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begins a block that `stop` ends."""
        self._depth += 1
        if self._depth == 1:
            self._began = self._now()

    def stop(self) -> None:
        """Ends a block."""
        self._depth -= 1
        if self._depth or self._began is None:
            return
        began, ended = self._began, self._now()
        if ended is None:
            return
        if not self._is_gpu:
            self._seconds += ended - began
            return
        self._passing.append((began, ended))
        self._read()

    def around(self, look: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose calls are blocks, except in compiled code, which has no blocks."""

        def looked(*args: Any) -> Any:
            if torch.compiler.is_compiling():
                return look(*args)
            with self:
                return look(*args)

        return looked

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read(self) -> None:
        # Both are asked: the second may be in another stream.
        while self._passing and all(event.query() for event in self._passing[0]):
            began, ended = self._passing.popleft()
            self._seconds += began.elapsed_time(ended) / 1000


class Untimed(nullcontext[None]):
    """A `Clock` that does nothing, for when no time is needed."""

    def around(self, look: Callable[..., Any]) -> Callable[..., Any]:
        """The function itself."""
        return look


UNTIMED = Untimed()
