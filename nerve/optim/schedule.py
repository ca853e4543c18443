"""Learning rate schedules: a multiplier of the base learning rate for each update of a run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nerve.config import require, require_choice
from nerve.errors import ConfigError

DECAYS: dict[str, Callable[[float, float], float]] = {
    "cosine": lambda t, power: 0.5 * (1.0 + math.cos(math.pi * t)),
    "linear": lambda t, power: 1.0 - t,
    "polynomial": lambda t, power: (1.0 - t) ** power,
    "constant": lambda t, power: 1.0 - t,
}
"""Name to `decay(t, power)`, which falls from 1 at t = 0 to 0 at t = 1; t is the elapsed fraction
of the decay."""


@dataclass(frozen=True)
class Schedule:
    """Warm-up, possibly a constant phase, and a decay.

    Step s (0-based) is the update that takes the weights from s to s + 1, out of n. With
    w = round(warmup · n) and the decay's first step d, its multiplier is

        (s + 1) / w                                   for s < w,
        1                                             for w ≤ s < d,
        final + (1 - final) · decay((s - d)/(n - d))  for d ≤ s < n,
        final                                         for s ≥ n.

    d = w for `cosine`, `linear` and `polynomial`; `constant` stays at 1 until the last
    round(cooldown · n) steps (fewer if the warm-up leaves fewer), in which it falls linearly. The
    multiplier is 1 at steps w - 1 to d, and would be `final` at step n: no update has a learning
    rate of zero, and the last one has t = 1 - 1/(n - d). Range [min(1/w, final), 1].

    Attributes:
        name: one of `DECAYS`.
        warmup: fraction of the steps for the linear warm-up, in [0, 1).
        final: multiplier at the end of the decay, in [0, 1].
        power: exponent of (1 - t), above 0; required by `polynomial`, and only allowed there.
        cooldown: fraction of the steps for the decay, in [0, 1 - warmup]; required by `constant`,
            and only allowed there. 0 keeps the learning rate to the end.

    Raises:
        ConfigError: for a value out of range, or a `power` or `cooldown` for another name.
    """

    name: str
    warmup: int | float = 0.0
    final: int | float = 0.0
    power: int | float | None = None
    cooldown: int | float | None = None

    def __post_init__(self) -> None:
        key = "optimizer.schedule"
        require_choice(f"{key}.name", self.name, DECAYS)
        _require_number(f"{key}.warmup", self.warmup, lambda x: 0.0 <= x < 1.0, "in [0, 1)")
        _require_number(f"{key}.final", self.final, lambda x: 0.0 <= x <= 1.0, "in [0, 1]")
        self._require_owner("power", "polynomial", "1 for a linear decay")
        self._require_owner("cooldown", "constant", "0.2 for the last fifth of the steps")
        if self.power is not None:
            _require_number(f"{key}.power", self.power, lambda x: x > 0.0, "finite and above 0")
        if self.cooldown is not None:
            rule = f"in [0, 1 - warmup] with {key}.warmup={self.warmup}"
            _require_number(
                f"{key}.cooldown",
                self.cooldown,
                lambda x: 0.0 <= x <= 1.0 - self.warmup,
                rule,
            )

    def _require_owner(self, field: str, owner: str, example: str) -> None:
        """`field` must be given with `name=owner` and null with any other name."""
        value = getattr(self, field)
        if self.name == owner:
            require(
                value is not None,
                f"optimizer.schedule.name={owner} needs optimizer.schedule.{field}, for example "
                f"{example}; got null.",
            )
        else:
            require(
                value is None,
                f"optimizer.schedule.{field} only applies to name={owner}; got {value} with "
                f"name={self.name}. Set it to null or choose optimizer.schedule.name={owner}.",
            )

    def multiplier(self, step: int, n_steps: int) -> float:
        """The factor on the base learning rate at update `step` (0-based) of `n_steps`.

        Raises:
            ConfigError: for n_steps < 1 or step < 0.
        """
        require(n_steps >= 1, f"A schedule needs at least one step; got n_steps={n_steps}.")
        require(step >= 0, f"Steps are counted from 0; got step={step}.")
        n_warmup = round(self.warmup * n_steps)
        if step < n_warmup:
            return (step + 1) / n_warmup
        start = n_warmup
        if self.cooldown is not None:
            start = max(n_warmup, n_steps - round(self.cooldown * n_steps))
        if step < start:
            return 1.0
        elapsed = (step - start) / (n_steps - start) if step < n_steps else 1.0
        decay = DECAYS[self.name](elapsed, 1.0 if self.power is None else self.power)
        return self.final + (1.0 - self.final) * decay

    def scheduler(self, optimizer: Optimizer, n_steps: int) -> LambdaLR:
        """Sets the `lr` of each group by the schedule; to be stepped after each of `n_steps`
        updates.

        Raises:
            ConfigError: for n_steps < 1.
        """
        return LambdaLR(optimizer, lambda step: self.multiplier(step, n_steps))


def _require_number(key: str, value: Any, holds: Callable[[float], bool], rule: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and holds(value)):
        raise ConfigError(f"{key} must be a number {rule}; got {value!r}.")
