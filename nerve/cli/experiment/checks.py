"""Checks of a configuration as a whole, in addition to what each group checks itself.

Every check is one of `nerve.config` or of `require`: it raises `ConfigError` with the rule, what
was received and the likely fix. None needs the data, and the only one that depends on the machine
asks which packages are installed.
"""

import math
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from nerve.cli.config.compose import CONF
from nerve.cli.experiment.arguments import class_of
from nerve.cli.experiment.group_plans import seq_len_of
from nerve.cli.experiment.trainer import TrainerPlan
from nerve.config import (
    require,
    require_choice,
    require_count,
    require_group,
    require_left,
    require_type,
)
from nerve.measuring.projection import PROJECTED
from nerve.models import MODELS
from nerve.optim import Role
from nerve.recording.settings import MonitorSettings

LOGGERS = ("tensorboard", "wandb")
"""Options of `logger` that need a package; the package and the extra have the same name."""

CONFIG_GROUPS = (
    "model",
    "normalization",
    "activation",
    "position",
    "ffn",
    "regularizer",
    "optimizer",
    "data",
    "trainer",
    "monitor",
    "checkpoint",
    "logger",
    "callbacks",
)
SINGLE_KEYS = ("seed", "threads", "compile", "resume", "check", "retry", "objective")

MOST_THREADS = 4096
"""More than any machine has; each thread needs memory."""

MOST_LAYERS = 100_000
"""With more, the modules do not fit into a process, however small their weights are."""

ELEMENTWISE = frozenset(
    f"torch.optim.{name}"
    for name in (
        *("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop"),
        *("Rprop", "SGD"),
    )
)
"""Elementwise optimizers, which do not depend on the shape of a parameter."""

BOOLEAN_KEYS = ("compile", "retry", "check")


# Before the values are resolved, because that fails in OmegaConf's words if groups do not match


def require_whole(config: Mapping[str, Any]) -> None:
    """Refuses a configuration in which a part was deleted, or a group was replaced by a single
    value.

    Args:
        config: as plain values, with interpolations as strings.
    """
    for key in (*CONFIG_GROUPS, *SINGLE_KEYS):
        require(
            key in config,
            f"A configuration has all of its values; {key} is missing. Leave ~{key} out.",
        )
    require_groups(config)


def require_groups(config: Mapping[str, Any]) -> None:
    """Refuses a single value in place of a group; an interpolation may become a group."""
    for key in CONFIG_GROUPS:
        if not _is_interpolation(config[key]):
            require_group(key, config[key])


def _is_interpolation(value: object) -> bool:
    return isinstance(value, str) and value.startswith("${")


def require_parts(optimizer: Mapping[str, Any]) -> None:
    """Refuses optimizers without roles, or without the values from which they are built."""
    require_group("optimizer", optimizer, ("parts", "schedule"))
    require_group("optimizer.parts", optimizer["parts"])
    for name, part in optimizer["parts"].items():
        key = f"optimizer.parts.{name}"
        require_group(key, part, ("roles", "build"))
        require_group(f"{key}.build", part["build"], ("_target_",))
        for each in part:
            require_choice(f"a key of {key}", each, ("roles", "build"))


def require_suited(config: DictConfig) -> None:
    """Refuses data that cannot provide what the model needs."""
    for key in ("model", "data"):  # one may have been an interpolation
        require_group(key, config[key])
    kind = config.model.get("kind")
    require_choice("model.kind", kind, MODELS)
    data = class_of("data", config.data)
    suited = [
        other
        for other, network in MODELS.items()
        if all(hasattr(data, name) for name in network.DATA_DIMS)
    ]
    # Data that suits no model by its class is checked again once it is set up.
    require(
        kind in suited or not suited,
        f"Data and model must suit each other; model.kind={kind} cannot be trained on "
        f"{data.__name__}, which is for model.kind={' or '.join(suited)}. Choose another data "
        "group or another model.",
    )


def require_given(config: Mapping[str, Any]) -> None:
    """Refuses a configuration that lacks a value without a default. The argument is as in
    `require_whole`."""
    missing = sorted(_missing(config))
    require(
        not missing,
        f"Values without a default must be given; {', '.join(missing)} is missing. "
        f"Add {' '.join(f'{key}=…' for key in missing)}.",
    )


def _missing(values: Any, prefix: str = "") -> list[str]:
    if isinstance(values, dict):
        return [key for k, v in values.items() for key in _missing(v, f"{prefix}.{k}")]
    if isinstance(values, list):
        return [key for i, v in enumerate(values) for key in _missing(v, f"{prefix}[{i}]")]
    return [prefix.removeprefix(".")] if values == "???" else []


# Of the resolved values


def require_single_values(values: Mapping[str, Any]) -> None:
    """Refuses values outside of the groups that are out of range."""
    for key in BOOLEAN_KEYS:
        require_type(key, values[key], bool)
    seed, threads = values["seed"], values["threads"]
    require(
        isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**32,
        f"seed must be a whole number from 0 to 2**32 - 1; got {seed!r}.",
    )
    require_count("threads", threads, or_null=True)
    require(
        threads is None or threads <= MOST_THREADS,
        f"threads must be at most {MOST_THREADS:,}, more than any machine has cores; got "
        f"{threads!r}. Leave it null for torch's own choice.",
    )
    for group in ("model", "ffn", "normalization", "activation", "regularizer", "optimizer"):
        _require_finite(group, values[group])
    n_layers = values["model"].get("n_layers")
    require(
        not isinstance(n_layers, int) or n_layers <= MOST_LAYERS,
        f"model.n_layers must be at most {MOST_LAYERS:,}; got {n_layers!r}.",
    )


def _require_finite(key: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _require_finite(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _require_finite(f"{key}[{i}]", inner)
    else:
        require(
            not isinstance(value, float) or math.isfinite(value),
            f"{key} must be a finite number; got {value!r}.",
        )


def require_whole_matrices(values: Mapping[str, Any]) -> None:
    """Refuses optimizers of matrices if each process has only a flat piece of them."""
    strategy = values["trainer"]["strategy"]
    named = strategy.get("_target_") if isinstance(strategy, Mapping) else strategy
    if not re.search("fsdp|deepspeed|modelparallel", str(named), re.IGNORECASE):
        return
    for name, part in values["optimizer"]["parts"].items():
        target = str(part["build"]["_target_"])
        require(
            target in ELEMENTWISE,
            "With sharded parameters, each process has flat pieces of matrices, so the optimizer "
            "must be elementwise, or it would train another network than on one device; got "
            f"trainer.strategy={named} with "
            f"optimizer.parts.{name}.build._target_={target}. Use trainer=ddp, or optimizer=adamw "
            "or sgd.",
        )


def require_named_optimizer(optimizer: Mapping[str, Any]) -> None:
    """Refuses the name of an optimizer that does not update the hidden weights, because tables
    label runs with it."""
    name, parts = optimizer.get("name"), optimizer["parts"].values()
    require_type("optimizer.name", name, str)
    targets = [str(part["build"]["_target_"]) for part in parts if _has_hidden(part)]
    require(
        not targets
        or name not in optimizers()
        or name in [each.rpartition(".")[2].lower() for each in targets],
        f"optimizer.name is what tables call the optimizer of the hidden weights; got "
        f"{name} for {' and '.join(targets)}. Choose the optimizer with optimizer={name}.",
    )


def _has_hidden(part: Mapping[str, Any]) -> bool:
    return isinstance(part["roles"], list) and Role.HIDDEN in part["roles"]


@cache
def optimizers() -> frozenset[str]:
    """The options of the group `optimizer`."""
    return frozenset(path.stem for path in (CONF / "optimizer").glob("*.yaml"))


def require_packages(loggers: Mapping[str, Any]) -> None:
    """Refuses a logger whose package is not installed."""
    for name in loggers:
        require(
            name not in LOGGERS or find_spec(name) is not None,
            f"A logger's package must be installed; logger={name} needs {name}, which is not. In "
            f'the checkout of nerve: pip install -c constraints.txt -e ".[{name}]"',
        )


def require_positions(monitor: MonitorSettings, values: Mapping[str, Any]) -> None:
    """Refuses to skip or group by positions if there are none, or none would be left."""
    kind, skip_first = values["model"]["kind"], monitor.skip_first
    of_text = [name for name in monitor.groups if name != "halves"]
    require(
        kind == "gpt" or not of_text,
        f"monitor.groups={of_text} are groups of text tokens; with model.kind={kind} only halves "
        "are possible. Leave the others out.",
    )
    seq_len, longest = seq_len_of(values["data"]), values["model"].get("seq_len")
    require(
        seq_len is None or not isinstance(longest, int) or seq_len <= longest,
        f"model.seq_len is the longest sequence that the model takes; got {longest} with "
        f"data.seq_len={seq_len}. Raise model.seq_len or shorten the sequences.",
    )
    if not skip_first:
        return
    require(
        kind == "gpt",
        f"monitor.skip_first excludes positions of text; with model.kind={kind} it "
        f"must be 0, got {skip_first!r}.",
    )
    if seq_len is not None:
        require_left("monitor.skip_first", skip_first, "data.seq_len", seq_len)


def require_readable_weight(
    monitor: MonitorSettings, constraint: str, trainer: TrainerPlan
) -> None:
    """Refuses to project pre if the weight before it is recomputed at each access."""
    require(
        constraint == "none"
        or monitor.source == "heldout"
        or monitor.shortcut != PROJECTED
        or trainer.has_exact_features,
        f"monitor.shortcut={PROJECTED} reads the weight before pre, which ffn.constraint="
        f"{constraint} recomputes in training; got monitor.source=train. Set monitor.shortcut=true "
        "or monitor.source=heldout.",
    )


def require_tokens_of_text(n_tokens: int | str, kind: str) -> None:
    """Refuses a number of tokens to measure if the data has no tokens."""
    require(
        kind == "gpt" or n_tokens == "auto",
        "monitor.n_tokens counts held-out tokens of text; with images it must be auto, got "
        f"{n_tokens!r}. Set data.n_heldout, the held-out images.",
    )
