"""Numbers of a device that the host reads later, so that neither waits for the other."""

from collections.abc import Callable

import torch
from torch import Tensor


class HostCopy:
    """A copy of numbers on the host; only reading them waits for the device.

    The copy from a GPU starts at once. By the time the numbers are read, the host has queued more
    work for the GPU, which therefore does not idle.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._copied: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.current_stream(numbers.device).record_event()

    def numbers(self) -> Tensor:
        """The numbers, on the host; waits for them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers


class Flag(HostCopy):
    """A condition on numbers of a device, which waits for them when it is evaluated.

    Args:
        numbers: one boolean, or what `holds` takes.
        holds: evaluates the condition from the numbers, on the host.
    """

    def __init__(self, numbers: Tensor, holds: Callable[[Tensor], bool] = bool) -> None:
        super().__init__(numbers)
        self._holds = holds

    def __bool__(self) -> bool:
        return self._holds(self.numbers())
