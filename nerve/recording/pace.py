"""How far the thread that trains runs ahead of its GPU."""

from collections import deque

import torch

from nerve.cores import share_among_trials


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
