"""Overlaps training on a GPU with the work that follows a measurement: separate CUDA streams, and
waits that leave the training thread's core free."""

import ctypes
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nerve.cores import share_among_trials

log = logging.getLogger(__name__)

_WAYS_TO_WAIT, _SLEEP = 7, 4
"""The bits of a context's flags that say how threads wait for the device, and the value for
sleeping."""


class Aside:
    """A side CUDA stream for work that training need not wait for: many small kernels, and
    collectives. On a CPU there is no side stream.

    Tensors used there were allocated on training's stream, which may reuse their memory as soon as
    they are freed. So references to them are held here until that work is done.

    Args:
        device: where the model trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: deque[tuple[torch.cuda.Event, object]] = deque()

    @contextmanager
    def work_on(self, held: object) -> Iterator[None]:
        """Puts device work within the block on the side stream, after everything that training has
        queued so far; `held` contains the tensors it uses."""
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
        """Drops references to tensors whose work is done, without waiting."""
        while self._held and self._held[0][0].query():
            self._held.popleft()

    def close(self, *, wait: bool) -> None:
        """Drops all references, after waiting for the work if `wait`, since the memory will soon be
        reused. After an error, waiting could hang on a process that has exited."""
        if wait and self._held:
            self._held[-1][0].synchronize()
        self._held.clear()


class Pace:
    """Makes threads sleep while they wait for the GPU where trials share cores, and makes the
    training thread wait until the GPU has finished the previous step.

    Otherwise that thread runs ahead until the driver's queue is full, and waits there; by default a
    waiting thread keeps a core busy. Where trials share a GPU, threads wait most of the time, and
    the threads that solve on the host need that core. The GPU always has one step queued.

    Args:
        device: where the model trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_kept = device.type == "cuda" and share_among_trials() is not None
        self._ended: deque[torch.cuda.Event] = deque()
        if self._is_kept:
            sleep_while_waiting(device)

    def end_step(self) -> None:
        """Must be called once all work of a step has been queued on the device."""
        if not self._is_kept:
            return
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._ended.append(event)
        if len(self._ended) > 1:
            self._ended.popleft().synchronize()


def sleep_while_waiting(device: torch.device) -> None:
    """Makes every thread of this process that waits for `device` sleep instead of polling. Drivers
    before CUDA 12.1 do not support this; there nothing changes."""
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
        log.info("threads that wait for %s keep their cores busy: %s", device, refusal)
