"""Settings of the measurements during training: what is measured, and when."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from nerve.config import (
    from_mapping,
    require,
    require_choice,
    require_count,
    require_several,
    require_steps,
)
from nerve.measuring.projection import PROJECTED
from nerve.sites_and_groups import AROUND, GROUPINGS

SPACING = "log:"
"""Prefix of a request for a number of geometrically spaced steps: `log:30`."""


@dataclass(frozen=True)
class MeasuredSteps:
    """The steps of a cadence, plus single steps.

    Args:
        every_n_steps: measures steps 0, k, 2k, …; None for no cadence.
        steps: single steps, in any order.
    """

    every_n_steps: int | None
    steps: tuple[int, ...] = ()

    def __contains__(self, step: int) -> bool:
        return step in self.steps or self._next_of_cadence(step - 1) == step

    def after(self, step: int) -> int | None:
        """The first one after `step`; None if there is none."""
        later = [each for each in self.steps if each > step]
        following = self._next_of_cadence(step)
        return min(later if following is None else [*later, following], default=None)

    def _next_of_cadence(self, step: int) -> int | None:
        every = self.every_n_steps
        return None if every is None else (step // every + 1) * every


def require_shortcut(key: str, value: object) -> None:
    """Raises `ConfigError` unless `value` is a valid setting for computing pre from the FFN's
    input."""
    require(
        isinstance(value, bool) or value == PROJECTED,
        f"{key} must be true, false or {PROJECTED}; got {value!r}.",
    )


@dataclass(frozen=True)
class MonitorSettings:
    """The settings that decide what a monitor measures, and when. Their defaults are those of
    `nerve.watch`, `nerve.SpectralCallback` and `nerve.SpectralMonitor`; conf/config.yaml has those
    of nerve-run.

    Attributes:
        PREFIX: of the names in errors: the group of a configuration, or none for arguments.
        every_n_steps: optimizer steps between measurements, at steps 0, k, 2k, …; None for no such
            cadence.
        steps: additional single steps, in any order; or `log:n`: n geometrically spaced steps from
            1 to the last one, and step 0. None for none. With held-out data, the last step is
            always measured.
        source: `heldout` measures the features of the validation batches, in eval mode: one forward
            pass gives the loss and the spectra. `train` measures those of every micro-batch of the
            next training step, in train mode; the last step then has no row.
        spectra: whether to store eigenvalues, too; `auto` for d_ff up to 1024.
        layers: the layers to measure; None for all.
        shortcut: whether pre may be computed from the covariance of the FFN's input where that is
            as exact and cheaper; `projected`: for 16-bit features, too, without their own rounding.
        skip_first: number of positions to exclude at the beginning of each sequence, from the
            features but not from the loss.
        groups: groupings of the samples, among `position`, `frequency` and `halves`; each group is
            measured separately, too.
        groups_every: groups and sites are part of every n-th measurement, starting with the first.
        sites: additional sites to measure, among `stream_in`, `input`, `output` and `stream_out`.

    Raises:
        ConfigError: for a value out of range.
    """

    PREFIX: ClassVar[str] = ""

    every_n_steps: int | None = 100
    steps: list | str | None = None
    source: str = "heldout"
    spectra: bool | str = "auto"
    layers: list | None = None
    shortcut: bool | str = True
    skip_first: int = 0
    groups: list = field(default_factory=list)
    groups_every: int = 1
    sites: list = field(default_factory=list)

    def __post_init__(self) -> None:
        prefix = self.PREFIX
        require_count(f"{prefix}every_n_steps", self.every_n_steps, or_null=True)
        _check_steps(f"{prefix}steps", self.steps)
        require(
            self.every_n_steps is not None or self.steps is not None,
            f"{prefix}every_n_steps or {prefix}steps must be set, to select the measured steps; "
            "got null for both.",
        )
        require_choice(f"{prefix}source", self.source, ("heldout", "train"))
        require(
            self.spectra in (True, False, "auto"),
            f"{prefix}spectra must be true, false or auto; got {self.spectra!r}.",
        )
        require_shortcut(f"{prefix}shortcut", self.shortcut)
        require_count(f"{prefix}skip_first", self.skip_first, least=0)
        require_several(f"{prefix}groups", self.groups, GROUPINGS)
        require_several(f"{prefix}sites", self.sites, AROUND)
        require_count(f"{prefix}groups_every", self.groups_every)

    @classmethod
    def of(cls, **arguments: Any) -> Self:
        """The settings given as arguments of a function. Raises `ConfigError` also for a value of
        another type."""
        return from_mapping(cls, arguments)

    @property
    def begins_at_zero(self) -> bool:
        """Whether step 0 is measured, as with every cadence and every spacing."""
        return (
            self.every_n_steps is not None or isinstance(self.steps, str) or 0 in (self.steps or ())
        )

    def measured_steps(self, last: int | None) -> MeasuredSteps:
        """The steps to measure when training ends at step `last`, None if that is unknown. Raises
        `ConfigError` for a spacing that needs it."""
        return MeasuredSteps(self.every_n_steps, steps_of(self.steps, last))

    def require_some(self, last: int | None) -> None:
        """Raises `ConfigError` if training from step 0 to `last` would measure nothing, which can
        happen with features of training batches; `last` is None if unknown."""
        if self.source == "heldout" or last is None or self.begins_at_zero:
            return
        first = self.measured_steps(last).after(0)
        require(
            first is not None and first < last,
            f"This training would measure nothing: it ends at step {last}, and the first measured "
            f"step is {first}, on the training batch after it. Train longer, or measure earlier: "
            f"got every_n_steps={self.every_n_steps}, steps={self.steps}.",
        )


def _check_steps(key: str, steps: Any) -> None:
    """Raises `ConfigError` unless this is None, a list of steps or a spacing."""
    if isinstance(steps, str):
        require(
            re.fullmatch(rf"{SPACING}([2-9]|[1-9]\d{{1,4}})", steps) is not None,
            f"{key} must be a list of steps, null or a spacing such as log:30 (30 steps from 1 to "
            f"the last one, and 0), with up to 99,999 steps; got {steps!r}.",
        )
    elif steps is not None:
        require_steps(key, steps)


def steps_of(steps: Sequence[int] | str | None, last: int | None) -> tuple[int, ...]:
    """The single steps requested, in their order.

    Args:
        steps: a list, `log:n` for n geometrically spaced steps from 1 to `last` (some of which may
            coincide) and step 0, or None for none.
        last: the last step of training, if known.

    Raises:
        ConfigError: for a spacing if the last step is unknown.
    """
    if isinstance(steps, str):
        require(
            last is not None and last > 0,
            f"steps={steps} needs the last step, which is unknown here. Give a list of steps.",
        )
        assert last is not None
        n = int(steps.removeprefix(SPACING))
        return tuple(sorted({0, *(round(last ** (i / (n - 1))) for i in range(n))}))
    return tuple(sorted(set(steps or ())))
