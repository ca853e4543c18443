"""The plan of a run: its configuration, checked once, before a directory, a lock or any data."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import Parameter, signature
from types import NoneType
from typing import Any

import torch
from hydra.utils import get_class
from lightning.fabric.connector import _convert_precision_to_unified_args
from omegaconf import DictConfig, OmegaConf
from torch import nn

from nerve.cli.config.compose import build, resolved
from nerve.cli.experiment.objective import check_objective
from nerve.config import from_mapping, require, require_choice, require_type
from nerve.data.batches import BatchDataModule
from nerve.errors import ConfigError
from nerve.measuring.ffns import FFN, sites_of
from nerve.measuring.find import find_ffns
from nerve.models import MODELS, model_design
from nerve.models.gpt import GPTConfig
from nerve.models.mixer import MixerConfig
from nerve.optim import Part, Schedule, check_parts
from nerve.training.checkpoint_callback import Cadence
from nerve.training.monitor import SpectralMonitor

SAMPLES_PER_DIMENSION = 8
"""`monitor.n_tokens=auto` measures this many tokens a dimension of the widest FFN (N/D)."""

LOGGERS = ("tensorboard", "wandb")
"""Options of `logger` that need a package; it has their name, and so has the extra with it."""

_NOT_VALUES = ("store", "ffns")
"""Arguments of the monitor that no configuration gives."""

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
"""Values of the optimizers in conf/optimizer, all of them numbers."""


@dataclass(frozen=True)
class ModelPlan:
    """The network.

    Attributes:
        kind: a key of `MODELS`.
        design: what defines it; what only the data can tell is as `facts` has it.
        facts: what the data gives, so far as the configuration says it, else a stand-in.
        n_unknown: how many of `facts` are stand-ins.
        skeleton: the network of `design` on the meta device, without memory.
    """

    kind: str
    design: GPTConfig | MixerConfig
    facts: Mapping[str, int]
    n_unknown: int
    skeleton: nn.Module


@dataclass(frozen=True)
class DataPlan:
    """The data, apart from where they come from.

    Attributes:
        n_train_batches: batches that the run trains on.
        n_heldout_tokens: tokens to measure, before they are rounded up; None with images.
    """

    n_train_batches: int
    n_heldout_tokens: int | None

    @property
    def sizes(self) -> dict[str, int]:
        """As the data module takes them."""
        tokens = self.n_heldout_tokens
        sizes = {"n_train_batches": self.n_train_batches}
        return sizes if tokens is None else sizes | {"n_heldout_tokens": tokens}


@dataclass(frozen=True)
class OptimizerPlan:
    """The optimizers of the parameters' roles, and their common schedule."""

    parts: Mapping[str, Part]
    schedule: Schedule


@dataclass(frozen=True)
class TrainerPlan:
    """What the run itself reads of `trainer`; Lightning gets all of it."""

    max_steps: int
    accumulate_grad_batches: int
    log_every_n_steps: int
    enable_progress_bar: bool


@dataclass(frozen=True)
class Plan:
    """A run as its configuration describes it. What it holds can be run, so far as that can be told
    without the data and the machine.

    Attributes:
        config: as composed, with its interpolations; what `_target_` names is built from it.
        values: the same, resolved, as the record and the loggers have them.
        model, data, optimizer, trainer, checkpoint: the groups of these names.
        monitor: the arguments of `SpectralMonitor`.
        objective, seed, threads, compile, retry: the values of these names.
    """

    config: DictConfig
    values: Mapping[str, Any]
    model: ModelPlan
    data: DataPlan
    optimizer: OptimizerPlan
    trainer: TrainerPlan
    monitor: Mapping[str, Any]
    checkpoint: Cadence
    objective: str
    seed: int
    threads: int | None
    compile: bool
    retry: bool

    @classmethod
    def of(cls, config: DictConfig) -> "Plan":
        """The plan of a composed configuration, without Hydra's own node.

        Raises:
            ConfigError: for all that a configuration alone can tell to be wrong, naming the keys.
            NerveError: for what a part of the run refuses, in its words.
        """
        _require_suited(config)
        _require_given(config)
        values = resolved(config)
        kind = values["model"]["kind"]
        check_objective(values["objective"], kind)
        for key in ("compile", "retry", "check"):
            require(
                isinstance(values[key], bool), f"{key} must be true or false; got {values[key]!r}."
            )
        trainer = _trainer_plan(values)
        checkpoint = from_mapping(Cadence, values["checkpoint"], "checkpoint")
        checkpoint.require_reached(trainer.max_steps)
        schedule = _schedule(values["optimizer"])
        monitor = _monitor_plan(values)
        _require_packages(values["logger"])
        seed, threads = _seed(values["seed"]), _threads(values["threads"])
        model = _model_plan(values)
        widths = [width_of(ffn) for ffn in find_ffns(model.skeleton, layers=monitor["layers"])]
        data = DataPlan(
            trainer.max_steps * trainer.accumulate_grad_batches,
            _n_heldout_tokens(values, max(widths)) if kind == "gpt" else None,
        )
        _require_data(config, data, seed)
        return cls(
            config=config,
            values=values,
            model=model,
            data=data,
            optimizer=OptimizerPlan(_parts(config, model.skeleton), schedule),
            trainer=trainer,
            monitor=monitor,
            checkpoint=checkpoint,
            objective=values["objective"],
            seed=seed,
            threads=threads,
            compile=values["compile"],
            retry=values["retry"],
        )


def width_of(ffn: FFN) -> int:
    """d_ff of an FFN of ours."""
    width = sites_of(ffn)[1].width
    assert width is not None
    return width


# Before the values are resolved, which fails in OmegaConf's words where groups do not suit


def _data_class(config: DictConfig) -> type:
    target = config.data.get("_target_")
    try:
        return get_class(target)
    except Exception as error:  # an import runs code that may raise anything
        raise ConfigError(f"data._target_ must name a class; got {target!r}: {error}") from error


def _require_suited(config: DictConfig) -> None:
    kind = config.model.get("kind")
    require_choice("model.kind", kind, MODELS)
    data = _data_class(config)
    suited = [
        other
        for other, network in MODELS.items()
        if all(hasattr(data, fact) for fact in network.FACTS)
    ]
    # Data that says of no model that it suits it is asked again once it is set up.
    require(
        kind in suited or not suited,
        f"Data and model must suit each other; model.kind={kind} cannot be trained on "
        f"{data.__name__}, which is for model.kind={' or '.join(suited)}. Choose another data "
        "group or another model.",
    )


def _require_given(config: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(config))
    require(
        not missing,
        f"Values without a default must be given; {', '.join(missing)} is missing. "
        f"Add {' '.join(f'{key}=…' for key in missing)}.",
    )


# Single values


def _seed(seed: Any) -> int:
    require(
        isinstance(seed, int) and 0 <= seed < 2**32,
        f"seed must be a whole number from 0 to 2**32 - 1; got {seed!r}.",
    )
    return int(seed)


def _threads(threads: Any) -> int | None:
    require(
        threads is None or (isinstance(threads, int) and threads > 0),
        f"threads must be null or a positive whole number; got {threads!r}.",
    )
    return None if threads is None else int(threads)


def _require_packages(loggers: Mapping[str, Any]) -> None:
    for name in loggers:
        require(
            name not in LOGGERS or find_spec(name) is not None,
            f"A logger's package must be installed; logger={name} needs {name}, which is not. In "
            f'the checkout of nerve: pip install -c constraints.txt -e ".[{name}]"',
        )


# Groups


def _trainer_plan(values: Mapping[str, Any]) -> TrainerPlan:
    """What Lightning would take, or fail on in words of its own, once the data has been loaded."""
    trainer = values["trainer"]
    for key in ("max_steps", "accumulate_grad_batches"):
        value = trainer.get(key)
        require(
            isinstance(value, int) and value > 0,
            f"trainer.{key} must be a positive whole number; got {value!r}.",
        )
    clip = trainer.get("gradient_clip_val")
    require_type("trainer.gradient_clip_val", clip, float, NoneType)
    require(
        clip is None or clip >= 0,
        f"trainer.gradient_clip_val must be null or at least 0; got {clip!r}.",
    )
    every = trainer.get("log_every_n_steps")
    require_type("trainer.log_every_n_steps", every, int)
    require(every >= 0, f"trainer.log_every_n_steps must be at least 0; got {every!r}.")
    limit = trainer.get("limit_val_batches")
    require(
        limit != 0,
        f"A run must validate, as its result is the loss; got trainer.limit_val_batches={limit!r}. "
        "Leave it out; for less to validate on set monitor.n_tokens (images: data.n_heldout).",
    )
    require_type("trainer.enable_progress_bar", trainer.get("enable_progress_bar"), bool)
    try:
        _convert_precision_to_unified_args(trainer.get("precision"))
    except ValueError as error:
        raise ConfigError(f"trainer cannot be built: ValueError: {error}") from error
    _require_arguments("trainer", trainer)
    names = TrainerPlan.__dataclass_fields__
    return TrainerPlan(**{name: trainer[name] for name in names})


def _require_arguments(group: str, values: Mapping[str, Any]) -> None:
    """Refuses keys that what `_target_` names does not take."""
    parameters = signature(get_class(values["_target_"])).parameters
    if any(each.kind == Parameter.VAR_KEYWORD for each in parameters.values()):
        return
    for key in values:
        if not key.startswith("_"):
            require_choice(f"a key of {group}", key, list(parameters))


def _schedule(optimizer: Mapping[str, Any]) -> Schedule:
    """The schedule, after the numbers of which optimizers would complain in words of their own."""
    for name in _OPTIMIZER_NUMBERS:
        if name in optimizer:
            value = optimizer[name]
            require_type(f"optimizer.{name}", value, float)
            require(value >= 0, f"optimizer.{name} must be at least 0; got {value!r}.")
    return from_mapping(Schedule, optimizer["schedule"], "optimizer.schedule")


def _monitor_plan(values: Mapping[str, Any]) -> dict[str, Any]:
    monitor, kind = values["monitor"], values["model"]["kind"]
    options = [name for name in signature(SpectralMonitor).parameters if name not in _NOT_VALUES]
    for key in monitor:
        require_choice("a key of monitor", key, [*options, "n_tokens"])
    require(
        kind == "gpt" or monitor["n_tokens"] == "auto",
        "monitor.n_tokens counts held-out tokens of text; with images it must be auto, got "
        f"{monitor['n_tokens']!r}. Set data.n_heldout, the held-out images.",
    )
    skip_first = monitor["skip_first"]
    require_type("monitor.skip_first", skip_first, int)
    if skip_first:
        require(
            kind == "gpt",
            f"monitor.skip_first leaves out positions of text; with model.kind={kind} it "
            f"must be 0, got {skip_first!r}.",
        )
        seq_len = values["data"]["seq_len"]
        require(
            skip_first < seq_len,
            "monitor.skip_first must leave positions to measure; got "
            f"monitor.skip_first={skip_first} of data.seq_len={seq_len}.",
        )
    arguments = {key: value for key, value in monitor.items() if key != "n_tokens"}
    SpectralMonitor(None, **arguments)  # which knows the rules for them
    return arguments


def _model_plan(values: Mapping[str, Any]) -> ModelPlan:
    kind = values["model"]["kind"]
    facts: dict[str, int] = {}
    n_unknown = 0
    for name in MODELS[kind].FACTS:
        given = values["data"].get(name)
        if not isinstance(given, int) or given < 1:
            n_unknown += 1
            given = values["model"].get("patch_size", 1) if name == "image_size" else 1
        facts[name] = given
    design: Any = model_design(values, **facts)
    with torch.device("meta"):
        skeleton = MODELS[kind](design, seed=0)
    return ModelPlan(kind, design, facts, n_unknown, skeleton)


def _n_heldout_tokens(values: Mapping[str, Any], widest: int) -> int:
    """`monitor.n_tokens`, with `auto` worked out from the width of the widest FFN."""
    asked = values["monitor"]["n_tokens"]
    if asked == "auto":
        return SAMPLES_PER_DIMENSION * widest
    require(
        isinstance(asked, int) and asked > 0,
        f"monitor.n_tokens must be auto or a positive whole number; got {asked!r}.",
    )
    return int(asked)


def _require_data(config: DictConfig, data: DataPlan, seed: int) -> None:
    """Has our data modules check their values. Corpus, images and tokenizer are not looked at: they
    may be on another machine."""
    if issubclass(_data_class(config), BatchDataModule):
        elsewhere = {"tokenizer": None} if "tokenizer" in config.data else {}
        build(config.data, **data.sizes, **elsewhere, seed=seed, _recursive_=False)


def _parts(config: DictConfig, skeleton: nn.Module) -> dict[str, Part]:
    built = build(config.optimizer.parts)
    parts = {str(name): Part(tuple(part.roles), part.build) for name, part in built.items()}
    check_parts(skeleton, parts)
    return parts
