"""Finds the step at which training has diverged, without a wait for the device at every step."""

import sys

import torch
from torch import Tensor

from nerve.errors import DivergedError

NEVER = sys.maxsize
"""The first bad step if there is none."""


class Divergence:
    """Keeps the losses since the last check, and the first step whose loss was not finite.

    Keeping a loss launches no kernel; only a check waits for the device.
    """

    def __init__(self) -> None:
        self._first = NEVER
        self._losses: list[tuple[int, Tensor]] = []

    def note(self, step: int, loss: Tensor) -> None:
        """Keeps a loss, a tensor with one element that nothing overwrites."""
        self._losses.append((step, loss))

    @property
    def n_kept(self) -> int:
        """How many losses were noted since the last check."""
        return len(self._losses)

    def first(self) -> int:
        """The first step whose loss was not finite, `NEVER` if all were finite; waits for the
        device."""
        if self._losses:
            steps, losses = zip(*self._losses, strict=True)
            self._losses.clear()
            are_finite = torch.stack(losses).isfinite().tolist()
            bad = [step for step, is_finite in zip(steps, are_finite, strict=True) if not is_finite]
            self._first = min([self._first, *bad])
        return self._first

    def note_first(self, step: int) -> None:
        """Records the first bad step that another process has found, or `NEVER`."""
        self._first = min(self._first, step)

    def raise_at(self, step: int) -> None:
        """Raises `DivergedError` if a loss up to `step` was not finite."""
        first = self.first()
        if first <= step:
            raise diverged(first)


def diverged(step: int) -> DivergedError:
    """The error for a step."""
    return DivergedError(
        f"The loss must stay finite; it became NaN or infinite at step {step}. "
        "Lower optimizer.lr, or lengthen optimizer.schedule.warmup."
    )
