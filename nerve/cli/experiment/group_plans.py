"""Groups of a configuration in the form that a run uses, each checked separately; the group
`trainer` is in `trainer.py`."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from nerve.cli.config.compose import build
from nerve.cli.experiment.trainer import TrainerPlan
from nerve.config import (
    from_mapping,
    require,
    require_count,
    require_path,
    require_reached,
    require_type,
)
from nerve.metric_names import SAMPLES_PER_DIMENSION
from nerve.models import MODELS, Skeleton, model_design
from nerve.models.gpt import GPTConfig
from nerve.models.mixer import MixerConfig
from nerve.optim import Part, Schedule, check_parts
from nerve.recording.settings import MonitorSettings, steps_of

_OPTIMIZER_NUMBERS = (
    "lr",
    "rest_lr",
    "weight_decay",
    "rest_weight_decay",
    "momentum",
    "rank_fraction",
    "matrix_eps",
    "precondition_frequency",
)
"""Keys of the optimizers in conf/optimizer, all of them numeric."""


_PATHS_OF_DATA = ("cache_dir", "tokenizer", "corpus.path", "images.path")
_LISTS_OF_PATHS = ("corpus.paths", "corpus.roots")


@dataclass(frozen=True)
class MonitorPlan(MonitorSettings):
    """What is measured, and the number of held-out tokens: a number, or `auto` for
    `SAMPLES_PER_DIMENSION` times the d_ff of the widest FFN."""

    PREFIX: ClassVar[str] = "monitor."

    n_tokens: int | str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_tokens != "auto":
            require(
                isinstance(self.n_tokens, int) and self.n_tokens >= 1,
                "monitor.n_tokens must be auto or a whole number of at least 1; got "
                f"{self.n_tokens!r}.",
            )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `FitMonitor`, by name."""
        return {each.name: getattr(self, each.name) for each in fields(MonitorSettings)}

    def require_reached(self, last: int) -> None:
        """Raises `ConfigError` for single steps after the last step of training."""
        require_reached("monitor.steps", steps_of(self.steps, last), last)

    def n_heldout_tokens(self, widest: int) -> int:
        """Number of tokens to measure if the widest FFN has d_ff `widest`."""
        return SAMPLES_PER_DIMENSION * widest if self.n_tokens == "auto" else int(self.n_tokens)


@dataclass(frozen=True)
class ModelPlan:
    """The network.

    Attributes:
        kind: a key of `MODELS`.
        design: the arguments that define it; sizes that depend on the data come from `data_dims`.
        data_dims: sizes that the data determines; placeholders if the configuration lacks them.
        n_unknown: number of placeholders in `data_dims`.
        skeleton: the parameters of the network of `design`, without memory.
    """

    kind: str
    design: GPTConfig | MixerConfig
    data_dims: Mapping[str, int]
    n_unknown: int
    skeleton: Skeleton

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ModelPlan":
        """Creates it from a configuration."""
        kind = values["model"]["kind"]
        data_dims: dict[str, int] = {}
        n_unknown = 0
        for name in MODELS[kind].DATA_DIMS:
            given = values["data"].get(name)
            if not isinstance(given, int) or given < 1:
                n_unknown += 1
                given = values["model"].get("patch_size", 1) if name == "image_size" else 1
            data_dims[name] = given
        design: Any = model_design(values, **data_dims)
        return cls(kind, design, data_dims, n_unknown, Skeleton.of(design))

    @property
    def layers(self) -> range:
        """The layers with FFNs, which are all."""
        return range(self.design.n_layers)

    @property
    def ffn_widths(self) -> list[tuple[int, int]]:
        """d_in and d_ff of each FFN of a layer."""
        return [self.design.ffn_widths(name) for name in self.design.FFNS]


@dataclass(frozen=True)
class DataPlan:
    """The sizes of the data, without its source.

    Attributes:
        n_train_batches: number of batches that the run trains on.
        n_heldout_tokens: number of tokens to measure, before rounding up; None with images.
    """

    n_train_batches: int
    n_heldout_tokens: int | None

    @classmethod
    def of(cls, trainer: TrainerPlan, monitor: MonitorPlan, kind: str, widest: int) -> "DataPlan":
        """What these groups require of the data, for a model of that kind whose widest FFN has d_ff
        `widest`."""
        n_batches = trainer.max_steps * trainer.accumulate_grad_batches
        require(
            n_batches <= sys.maxsize,
            f"A run must have at most {sys.maxsize:,} batches; trainer.max_steps times "
            f"trainer.accumulate_grad_batches is {n_batches:,}.",
        )
        return cls(
            n_batches,
            monitor.n_heldout_tokens(widest) if kind == "gpt" else None,
        )

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes as the data module takes them."""
        tokens = self.n_heldout_tokens
        sizes = {"n_train_batches": self.n_train_batches}
        return sizes if tokens is None else sizes | {"n_heldout_tokens": tokens}


def seq_len_of(data: Mapping[str, Any]) -> int | None:
    """The tokens per sequence, which may be fewer than the model accepts; None if the data has no
    tokens or its configuration does not say how many."""
    seq_len = data.get("seq_len")
    return seq_len if isinstance(seq_len, int) else None


def require_paths_of_data(data: Mapping[str, Any]) -> None:
    """Refuses values that cannot be paths; whether the paths exist is not checked."""
    for name in (*_PATHS_OF_DATA, *_LISTS_OF_PATHS):
        node: Any = data
        *groups, leaf = name.split(".")
        for group in groups:
            node = node.get(group)
            node = node if isinstance(node, Mapping) else {}
        if node.get(leaf) is None and (name != "corpus.paths" or leaf not in node):
            continue
        value, key = node[leaf], f"data.{name}"
        if name in _LISTS_OF_PATHS and isinstance(value, list):
            require(bool(value), f"{key} must have a path; got an empty list.")
            for i, path in enumerate(value):
                require_path(f"{key}[{i}]", path)
        else:
            require_path(key, value)


@dataclass(frozen=True)
class OptimizerPlan:
    """The optimizers for the roles of parameters, and their common schedule."""

    parts: Mapping[str, Part]
    schedule: Schedule


def schedule_of(optimizer: Mapping[str, Any]) -> Schedule:
    """The schedule, after checking numbers for which optimizers would raise errors of their own."""
    for name in _OPTIMIZER_NUMBERS:
        if name in optimizer:
            value = optimizer[name]
            require_type(f"optimizer.{name}", value, float)
            require(value >= 0, f"optimizer.{name} must be at least 0; got {value!r}.")
    momentum = optimizer.get("momentum", 0)
    require(momentum < 1, f"optimizer.momentum must lie in [0, 1); got {momentum!r}.")
    if "precondition_frequency" in optimizer:
        require_count("optimizer.precondition_frequency", optimizer["precondition_frequency"])
    return from_mapping(Schedule, optimizer["schedule"], "optimizer.schedule")


def parts_of(optimizer: Mapping[str, Any], network: nn.Module) -> dict[str, Part]:
    """The optimizers, each with the values that it accepts and with parameters of the network."""
    parts: dict[str, Part] = {}
    for name, part in optimizer["parts"].items():
        built = build(part["build"], key=f"optimizer.parts.{name}.build")
        parts[name] = Part(part["roles"], built)
    check_parts(network, parts)
    return parts
