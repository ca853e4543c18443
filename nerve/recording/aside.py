"""Runs training on a GPU and the work after a measurement concurrently: on separate CUDA streams,
and without the training thread occupying its core while it waits."""

import ctypes
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nerve.cores import share_among_trials

log = logging.getLogger(__name__)

_WAYS_TO_WAIT, _SLEEP = 7, 4
"""The bits of a context's flags that say how threads wait for the device, and the one to sleep."""


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

    def close(self, *, wait: bool) -> None:
        """Lets go of all, once it is done if `wait`: its memory is soon others'. After an error it
        may wait for a process that has gone."""
        if wait and self._held:
            self._held[-1][0].synchronize()
        self._held.clear()


class Pace:
    """Has the threads that wait for the GPU sleep, where trials share the cores, and that which
    trains wait until its GPU has ended the step before.

    It runs ahead otherwise, until the driver takes no more, and waits there. A wait keeps a core
    busy unless the driver is told else. Where trials share a GPU, threads wait most of the time;
    those that solve on the host are to have that core. The GPU always has a step to do.

    Args:
        device: where the model trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_kept = device.type == "cuda" and share_among_trials() is not None
        self._ended: deque[torch.cuda.Event] = deque()
        if self._is_kept:
            sleep_while_waiting(device)

    def catch_up(self) -> None:
        """Waits for the steps that the GPU still has to do, so that what follows is timed alone."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def end_step(self) -> None:
        """To be called when all work of a step is given to the device."""
        if not self._is_kept:
            return
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._ended.append(event)
        if len(self._ended) > 1:
            self._ended.popleft().synchronize()


def sleep_while_waiting(device: torch.device) -> None:
    """Has each thread of this process that waits for `device` sleep, in place of asking again and
    again. Where the driver cannot be told so (before 12.1), it stays as it is."""
    flags = ctypes.c_uint()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the context is this thread's from here on
            refusal = driver.cuCtxGetFlags(ctypes.byref(flags))
            wanted = ctypes.c_uint(flags.value & ~_WAYS_TO_WAIT | _SLEEP)
            refusal = refusal or driver.cuCtxSetFlags(wanted)
    except (OSError, AttributeError) as error:
        refusal = error
    if refusal:
        log.info("threads that wait for %s occupy their cores: %s", device, refusal)
