"""Copies eigenproblems from a GPU to the host through reused pinned memory."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from queue import LifoQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from nerve.measuring.eigenproblem import FFNEigenproblem, GroupEigenproblem
from nerve.measuring.ffns import FFN, n_inputs, sites_of
from nerve.spectra.triangle import from_lower_blocks, lower_blocks, lower_bytes

E = TypeVar("E", bound=FFNEigenproblem | GroupEigenproblem)

N_BUFFERS = 2
"""Two: one is filled while the contents of the other are copied on."""

_ALIGNMENT = 64
_LOWER = ("before", "post", "matrix")
"""Only the lower triangle of these matrices counts and is copied."""


class Staging:
    """Copies eigenproblems while the device does other work; any thread may ask.

    Pinning memory takes half a second per GB, during which the device receives no work. So a few
    buffers are pinned, once.

    Args:
        device: the device of the eigenproblems.
    """

    def __init__(self, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_gpu else None
        self._buffers: LifoQueue[HostBuffer] = LifoQueue()
        for _ in range(N_BUFFERS):
            self._buffers.put(HostBuffer(pinned=is_gpu))

    def reserve(self, n_bytes: int) -> None:
        """Grows all buffers that are not in use to at least this size."""
        buffers = [self._buffers.get() for _ in range(N_BUFFERS)]
        try:
            for buffer in buffers:
                buffer.reserve(n_bytes)
        finally:
            for buffer in buffers:
                self._buffers.put(buffer)

    def to_host(self, eigenproblem: E, ready: torch.cuda.Event | None = None) -> E:
        """The same eigenproblem on the host, copied once the device has reached `ready`."""
        tensors = {
            name: value for name, value in vars(eigenproblem).items() if isinstance(value, Tensor)
        }
        buffer = self._buffers.get()
        try:
            on_stream = torch.cuda.stream(self._stream) if self._stream else nullcontext()
            with torch.inference_mode(False), torch.no_grad(), on_stream:
                if self._stream is not None and ready is not None:
                    self._stream.wait_event(ready)
                parts = {
                    name: lower_blocks(tensor) if name in _LOWER else [tensor]
                    for name, tensor in tensors.items()
                }
                held = iter(buffer.hold([part for each in parts.values() for part in each]))
                if self._stream is not None:
                    # A sleeping wait: the core is needed by the threads that solve.
                    copied = torch.cuda.Event(blocking=True)
                    copied.record(self._stream)
                    copied.synchronize()
                copies: dict[str, Any] = {
                    name: from_lower_blocks([next(held) for _ in parts[name]])
                    if name in _LOWER
                    else next(held).clone()
                    for name in parts
                }
        finally:
            self._buffers.put(buffer)
        return replace(eigenproblem, **copies)


class HostBuffer:
    """Host memory that grows to the largest request.

    Args:
        pinned: whether a GPU copies to it while it does other work.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, n_bytes: int) -> None:
        """Grows it to at least this size."""
        if len(self._memory) < n_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # never both
            self._memory = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def hold(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Starts copying `tensors`; the copies are valid until the next call."""
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
        self.reserve(sum(sizes))
        copies, start = [], 0
        for tensor, size in zip(tensors, sizes, strict=True):
            room = self._memory[start : start + tensor.nbytes]
            copies.append(room.view(tensor.dtype).view(tensor.shape))
            copies[-1].copy_(tensor, non_blocking=True)
            start += size
        return copies


def expected_bytes(ffn: FFN) -> int:
    """The buffer size that an FFN needs if there are more samples than its width; 0 if its modules
    do not reveal the width."""
    pre, post = sites_of(ffn)
    d_ff, d_in = pre.width or post.width or 0, n_inputs(pre) or 0
    return 2 * lower_bytes(d_ff) + 4 * d_ff * d_in + 4096
