"""How training on a GPU and what follows a measurement go on beside each other: the device has a
stream for each, and the thread that trains leaves its core while it would only wait."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nerve.cores import share_among_trials


class Aside:
    """A stream of a GPU for what need not be done before training goes on: many small kernels, and
    what processes exchange. On a CPU nothing is beside.

    What is used there was made by training's stream, which may give the memory away as soon as it
    is let go: so it is held here until that work is done.

    Args:
        device: where the model trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: deque[tuple[torch.cuda.Event, object]] = deque()

    @contextmanager
    def work_on(self, held: object) -> Iterator[None]:
        """Within it work for the device goes to the stream beside, after all that training has
        given it so far; `held` has what it uses."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._held.append((self._stream.record_event(), held))

    def let_go(self) -> None:
        """Lets go of what is done, without waiting."""
        while self._held and self._held[0][0].query():
            self._held.popleft()

    def close(self) -> None:
        """Lets go of all: what is still under way is of no use any more, and may wait for a process
        that has gone."""
        self._held.clear()


class Pace:
    """Has the thread that trains sleep until its GPU has ended the step before, where trials share
    the cores.

    It runs ahead otherwise, until the driver takes no more, and waits there with its core kept
    busy. Where trials share a GPU, that is most of the time; the threads that solve, which give way
    to it, are to have that core. The GPU always has a step to do.

    Args:
        device: where the model trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_kept = device.type == "cuda" and share_among_trials() is not None
        self._ended: deque[torch.cuda.Event] = deque()

    def end_step(self) -> None:
        """To be called when all work of a step is given to the device."""
        if not self._is_kept:
            return
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._ended.append(event)
        if len(self._ended) > 1:
            self._ended.popleft().synchronize()
