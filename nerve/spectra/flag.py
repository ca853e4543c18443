"""What a device finds out, on its way to the host while both go on."""

import torch
from jaxtyping import Bool
from torch import Tensor


class Flag:
    """A truth value, of which only whoever asks waits for the device.

    Of a GPU's the copy starts at once: between that and the question lies as much work for the
    device as the host has queued by then, so that the GPU does not run dry.

    Args:
        value: one boolean.
    """

    def __init__(self, value: Bool[Tensor, ""]) -> None:
        self._value = value
        self._arrived: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.current_stream(value.device).record_event()

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)
