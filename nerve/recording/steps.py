"""The steps that are measured: a cadence, single steps, or both."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nerve.config import require

SPACING = "log:"
"""How a number of steps, each a like factor after the one before, is asked for: `log:30`."""


@dataclass(frozen=True)
class MeasuredSteps:
    """The steps of a cadence together with single ones.

    Args:
        every_n_steps: measures steps 0, k, 2k, …; None for no cadence.
        steps: single steps, in any order.
    """

    every_n_steps: int | None
    steps: tuple[int, ...] = ()

    def __contains__(self, step: int) -> bool:
        return step in self.steps or self._next_of_cadence(step - 1) == step

    def after(self, step: int) -> int | None:
        """The first one that comes after `step`; None if none does."""
        later = [each for each in self.steps if each > step]
        following = self._next_of_cadence(step)
        return min(later if following is None else [*later, following], default=None)

    def _next_of_cadence(self, step: int) -> int | None:
        every = self.every_n_steps
        return None if every is None else (step // every + 1) * every


def check_steps(key: str, steps: Any) -> None:
    """Raises `ConfigError` unless this is None, a list of steps or a spacing."""
    if isinstance(steps, str):
        require(
            re.fullmatch(rf"{SPACING}([2-9]|[1-9]\d+)", steps) is not None,
            f"{key} must be a list of steps, null or a spacing such as log:30 (30 steps from 1 to "
            f"the last one, and 0); got {steps!r}.",
        )
    elif steps is not None:
        require(
            len(steps) > 0 and all(map(_is_step, steps)),
            f"{key} must be a list of optimizer steps, whole numbers from 0, as in [0,1,2,4,8]; "
            f"got {steps!r}.",
        )


def steps_of(steps: Sequence[int] | str | None, last: int | None) -> tuple[int, ...]:
    """Single steps as they were asked for, in their order.

    Args:
        steps: a list, `log:n` for n steps that divide 1 to `last` by like factors (some of which
            fall together) and step 0, or None for none.
        last: the step that ends training, where that is known.

    Raises:
        ConfigError: for a spacing without an end.
    """
    if isinstance(steps, str):
        require(
            last is not None and last > 0,
            f"steps={steps} divides the steps up to the last one, which is not known here. Give a "
            "list of steps.",
        )
        assert last is not None
        n = int(steps.removeprefix(SPACING))
        return tuple(sorted({0, *(round(last ** (i / (n - 1))) for i in range(n))}))
    return tuple(sorted(set(steps or ())))


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
