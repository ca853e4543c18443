"""The group `trainer` in the form that a run uses, and the number of its devices."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from lightning.fabric.connector import _convert_precision_to_unified_args
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from nerve.config import from_mapping, require, require_choice, require_count, require_group
from nerve.errors import ConfigError

_WHOLE: Mapping[str, tuple[Any, str]] = {
    "limit_val_batches": (
        1.0,
        "monitor.n_tokens (images: data.n_heldout) sets how much is held out",
    ),
    "limit_train_batches": (1.0, "trainer.max_steps sets how long to train"),
    "overfit_batches": (0.0, "data.corpus.roots sets what to train on"),
    "fast_dev_run": (False, "trainer.max_steps=2 is a short run"),
}
"""Options of Lightning's trainer that cut a run short, each with its neutral value and what to set
instead."""


@dataclass(frozen=True)
class TrainerPlan:
    """The values of `trainer` that the run itself reads, and checks of those that Lightning would
    accept, or reject in its own words, only after the data has been loaded. Lightning gets all of
    `trainer`.

    Raises:
        ConfigError: for a value out of range.
    """

    max_steps: int
    accumulate_grad_batches: int
    log_every_n_steps: int
    enable_progress_bar: bool
    gradient_clip_val: float | None = None
    limit_val_batches: int | float | None = None
    limit_train_batches: int | float | None = None
    overfit_batches: int | float | None = None
    fast_dev_run: bool | int | None = None
    precision: int | str | None = None
    num_nodes: int = 1

    def __post_init__(self) -> None:
        require_count("trainer.max_steps", self.max_steps)
        require_count("trainer.accumulate_grad_batches", self.accumulate_grad_batches)
        require_count("trainer.num_nodes", self.num_nodes)
        clip, every = self.gradient_clip_val, self.log_every_n_steps
        require(
            clip is None or clip >= 0,
            f"trainer.gradient_clip_val must be null or at least 0; got {clip!r}.",
        )
        require(every >= 0, f"trainer.log_every_n_steps must be at least 0; got {every!r}.")
        for name, (whole, instead) in _WHOLE.items():
            value = getattr(self, name)
            require(
                # Of these numbers 1 is one batch, and 1.0 are all.
                value is None or (value == whole and (not whole or isinstance(value, float))),
                f"A run trains and validates on all of the requested data; got trainer.{name}="
                f"{value!r}. Leave it out; {instead}.",
            )
        _ = self.arithmetic

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> "TrainerPlan":
        """Creates it from the values of `trainer`."""
        read = {each.name for each in fields(cls)} & trainer.keys()
        return from_mapping(cls, {name: trainer[name] for name in read}, "trainer")

    @cached_property
    def arithmetic(self) -> str:
        """`precision` under Lightning's full name for it, such as `32-true` or `bf16-mixed`.

        Raises:
            ConfigError: for one that Lightning does not know.
        """
        try:
            named = _convert_precision_to_unified_args(self.precision)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(f"trainer cannot be built: ValueError: {error}") from error
        return named or "32-true"

    @property
    def bytes_per_weight(self) -> int:
        """Bytes of a parameter, its gradient, and each number of the optimizer's state."""
        return {"64-true": 8, "16-true": 2, "bf16-true": 2}.get(self.arithmetic, 4)

    @property
    def has_exact_features(self) -> bool:
        """Whether features are computed in 32 or 64 bits, so that pre follows exactly from the
        FFN's input."""
        return self.arithmetic in ("32-true", "64-true")


def require_devices(trainer: Mapping[str, Any]) -> None:
    """Refuses devices that Lightning does not know or that cannot measure."""
    require_group("trainer", trainer, ("accelerator", "devices", "strategy"))
    accelerator, devices = trainer["accelerator"], _listed(trainer["devices"])
    known = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    require_choice("trainer.accelerator", accelerator, known)
    require(
        accelerator != "mps",
        "Spectra are computed in float64, which Apple GPUs do not support; got "
        "trainer.accelerator=mps. Use trainer=cpu, or an NVIDIA GPU.",
    )
    is_number = re.fullmatch(r"[1-9]\d*", str(devices)) is not None
    require(
        is_number or devices in (-1, "-1", "auto") or _are_ids(devices),
        "trainer.devices must be auto, -1 (all), a number of at least 1, or a list of different "
        f"devices such as [0,1]; got {trainer['devices']!r}.",
    )
    require(
        accelerator != "cpu" or is_number or devices == "auto",
        "With trainer.accelerator=cpu, trainer.devices is the number of processes; got "
        f"{trainer['devices']!r}. Use trainer.devices=1.",
    )
    strategy = trainer["strategy"]
    if isinstance(strategy, Mapping) and "_target_" in strategy:
        require(
            _starts_the_command(strategy),
            "Each process of a run must be the command itself, which popen starts again; got "
            f"trainer.strategy.start_method={strategy.get('start_method')}. Leave it out.",
        )
        return
    named = StrategyRegistry.available_strategies()
    started = [n for n in named if _starts_the_command(StrategyRegistry[n]["init_params"])]
    require_choice("trainer.strategy", strategy, ("auto", *started))


def _starts_the_command(strategy: Mapping[str, Any]) -> bool:
    """Whether a strategy starts the command again for each device; the alternative, a copy of the
    process that trains, would not know the files of the run."""
    return strategy.get("start_method", "popen") == "popen"


def n_devices_of(trainer: Mapping[str, Any]) -> int | None:
    """Number of devices on each node; None if Lightning determines it.

    Args:
        trainer: values of the group `trainer`.
    """
    devices = _listed(trainer["devices"])
    if isinstance(devices, int | str):
        return int(devices) if str(devices).isdigit() else None
    return len(devices) if isinstance(devices, Sequence) else None


def _listed(devices: object) -> object:
    """`trainer.devices`, with a string such as `0,1` or `3,` as a list."""
    if isinstance(devices, str) and re.fullmatch(r"\d+,(\d+,)*\d*", devices):
        return [int(each) for each in devices.split(",") if each]
    return devices


def _are_ids(devices: object) -> bool:
    if not isinstance(devices, list) or not devices:
        return False
    are_numbers = all(type(each) is int and each >= 0 for each in devices)
    return are_numbers and len({*devices}) == len(devices)
