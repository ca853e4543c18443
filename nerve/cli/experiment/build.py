"""The parts of a run, built from its configuration: data, model, trainer."""

from collections.abc import Mapping
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import NoneType
from typing import Any

import lightning as L
import torch
from hydra.utils import get_class
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf
from torch import nn

from nerve.cli.config.compose import build
from nerve.cli.experiment.objective import check_objective
from nerve.config import from_mapping, require, require_choice, require_type
from nerve.errors import ConfigError
from nerve.measuring.ffns import find_ffns
from nerve.models import MODELS, build_model
from nerve.optim import Part, Schedule, build_optimizer
from nerve.storage.store import RunStore
from nerve.training.callbacks import RunProgressBar
from nerve.training.checkpoint_files import CheckpointFiles
from nerve.training.loggers import StoreLogger
from nerve.training.module import ImageClassifier, LanguageModel, TrainedModel
from nerve.training.monitor import SpectralMonitor

SAMPLES_PER_DIMENSION = 8
"""`monitor.n_tokens=auto` measures this many tokens a dimension of the widest FFN (N/D)."""

TASKS: dict[str, tuple[type[TrainedModel], str]] = {
    "gpt": (LanguageModel, "tokens"),
    "mixer": (ImageClassifier, "images"),
}
"""The kind of a model to the Lightning module that trains it, and what its batches count."""


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

LOGGERS = ("tensorboard", "wandb")
"""Options of `logger` that need a package; it has their name, and so has the extra with it."""


def check(config: DictConfig) -> None:
    """Refuses what can be told before anything is built: data of the other kind, values that were
    not given, an objective that no run will have, a logger that is not installed."""
    kind, target = config.model.kind, config.data.get("_target_")
    require_choice("model.kind", kind, TASKS)
    try:
        data = get_class(target)
    except Exception as error:  # an import runs code that may raise anything
        raise ConfigError(f"data._target_ must name a class; got {target!r}: {error}") from error
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
    missing = sorted(OmegaConf.missing_keys(config))
    require(
        not missing,
        f"Values without a default must be given; {', '.join(missing)} is missing. "
        f"Add {' '.join(f'{key}=…' for key in missing)}.",
    )
    check_objective(config.objective, kind)
    _check_numbers(config)
    _check_trainer(config.trainer)
    options = [name for name in signature(SpectralMonitor).parameters if name not in _NOT_VALUES]
    for key in config.monitor:
        require_choice("a key of monitor", key, [*options, "n_tokens"])
    require(
        kind == "gpt" or config.monitor.n_tokens == "auto",
        "monitor.n_tokens counts held-out tokens of text; with images it must be auto, got "
        f"{config.monitor.n_tokens!r}. Set data.n_heldout, the held-out images.",
    )
    _check_skip(config)
    require_type("trainer.enable_progress_bar", config.trainer.enable_progress_bar, bool)
    for name in config.logger:
        require(
            name not in LOGGERS or find_spec(name) is not None,
            f"A logger's package must be installed; logger={name} needs {name}, which is not. In "
            f'the checkout of nerve: pip install -c constraints.txt -e ".[{name}]"',
        )


def _check_skip(config: DictConfig) -> None:
    """Refuses to leave out all positions, or positions of what has no sequences."""
    skip_first = config.monitor.skip_first
    require_type("monitor.skip_first", skip_first, int)
    if not skip_first:
        return
    require(
        config.model.kind == "gpt",
        f"monitor.skip_first leaves out positions of text; with model.kind={config.model.kind} it "
        f"must be 0, got {skip_first!r}.",
    )
    require(
        skip_first < config.data.seq_len,
        "monitor.skip_first must leave positions to measure; got "
        f"monitor.skip_first={skip_first} of data.seq_len={config.data.seq_len}.",
    )


def check_machine(config: DictConfig) -> None:
    """Refuses a run that this machine has no device for."""
    accelerator = config.trainer.get("accelerator")
    require(
        accelerator not in ("gpu", "cuda") or _has_gpu(),
        f"trainer.accelerator={accelerator} needs a GPU; torch {torch.__version__} finds none that "
        "it can use. Take trainer=cpu, or install torch for this machine's GPU.",
    )


def _check_numbers(config: DictConfig) -> None:
    """What optimizers would refuse in words of their own, once the data has been loaded."""
    for key in _OPTIMIZER_NUMBERS:
        if key in config.optimizer:
            value = config.optimizer[key]
            require_type(f"optimizer.{key}", value, float)
            require(value >= 0, f"optimizer.{key} must be at least 0; got {value!r}.")


def _check_trainer(trainer: DictConfig) -> None:
    """What Lightning would take, or fail on in words of its own, once the data has been loaded."""
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


def _has_gpu() -> bool:
    return CUDAAccelerator.is_available() or MPSAccelerator.is_available()


def check_steps(values: dict[str, Any]) -> None:
    """Raises `ConfigError` unless a run's steps, and batches a step, are positive numbers."""
    for key in ("max_steps", "accumulate_grad_batches"):
        value = values["trainer"][key]
        require(
            isinstance(value, int) and value > 0,
            f"trainer.{key} must be a positive whole number; got {value!r}.",
        )


def build_data(config: DictConfig, values: dict[str, Any]) -> Any:
    """The data module, prepared: the model needs facts that only the data knows."""
    trainer = values["trainer"]
    n_batches = trainer["max_steps"] * trainer["accumulate_grad_batches"]
    sizes: dict[str, int] = {"n_train_batches": n_batches}
    if values["model"]["kind"] == "gpt":
        sizes["n_heldout_tokens"] = _n_tokens(values)
    data = build(config.data, **sizes, seed=values["seed"])
    data.prepare_data()
    data.setup("fit")
    return data


def _n_tokens(values: dict[str, Any]) -> int:
    """`monitor.n_tokens`, with `auto` worked out from the widest FFN of the model."""
    asked = values["monitor"]["n_tokens"]
    if asked != "auto":
        require(
            isinstance(asked, int) and asked > 0,
            f"monitor.n_tokens must be auto or a positive whole number; got {asked!r}.",
        )
        return int(asked)
    with torch.device("meta"):
        skeleton = build_model(values, seed=0, vocab_size=1)
    return SAMPLES_PER_DIMENSION * max(_width(ffn.post) for ffn in find_ffns(skeleton))


def _width(down: nn.Module) -> int:
    width = down.in_features
    assert isinstance(width, int)
    return width


def facts_of(data: Any, kind: str) -> dict[str, Any]:
    """What a model of that kind must know of the data, such as `vocab_size`."""
    return {fact: getattr(data, fact) for fact in MODELS[kind].FACTS if hasattr(data, fact)}


def build_module(
    config: DictConfig, values: Mapping[str, Any], facts: Mapping[str, Any]
) -> TrainedModel:
    """The model, with its loss, optimizer and schedule."""
    trained_model, _ = TASKS[values["model"]["kind"]]
    return trained_model(
        build_model(values, seed=values["seed"], **facts),
        lambda model: build_optimizer(model, _parts(config)),
        from_mapping(Schedule, values["optimizer"]["schedule"], "optimizer.schedule"),
        compile=values["compile"],
    )


def _parts(config: DictConfig) -> dict[str, Part]:
    built = build(config.optimizer.parts)
    return {str(name): Part(tuple(part.roles), part.build) for name, part in built.items()}


def build_trainer(
    config: DictConfig,
    directory: Path,
    store: RunStore | None,
    callbacks: list[L.Callback],
    files: CheckpointFiles,
) -> L.Trainer:
    """The trainer, with the loggers and callbacks of the configuration beside those given."""
    loggers: list[Logger] = [build(logger) for logger in config.logger.values()]
    if store:
        loggers.insert(0, StoreLogger(store))
    callbacks = callbacks + [build(callback) for callback in config.callbacks.values()]
    if config.trainer.enable_progress_bar:
        callbacks.append(RunProgressBar(TASKS[config.model.kind][1]))
    plugins: list[Any] = [files]
    if SLURMEnvironment.detect():
        # Lightning's own requeueing would act beside ours, and beside submitit's.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    trainer: L.Trainer = build(
        config.trainer,
        log_every_n_steps=min(config.trainer.log_every_n_steps, config.trainer.max_steps),
        callbacks=callbacks,
        logger=loggers,
        plugins=plugins,
        default_root_dir=str(directory),
        max_epochs=-1,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return trainer


def build_monitor(store: RunStore | None, values: Mapping[str, Any]) -> SpectralMonitor:
    """The monitor of the configuration; `store` as there."""
    asked = {key: value for key, value in values["monitor"].items() if key != "n_tokens"}
    return SpectralMonitor(store, **asked)


def log_configuration(trainer: L.Trainer, values: dict[str, Any]) -> None:
    """Gives the loggers the configuration, which starts those that write elsewhere.

    Raises:
        ConfigError: when one cannot start, for want of a login, say.
    """
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams(values)
        except Exception as error:  # it may be about anything
            raise ConfigError(
                f"A logger must be able to start; {type(logger).__name__} could not: "
                f"{str(error).rstrip('.')}. Mend that, or choose another with logger=csv."
            ) from error
