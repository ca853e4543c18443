"""The parts of a run, built from its configuration: data, model, trainer."""

import logging
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.utilities import rank_zero_only

from nerve.cli.config.compose import build
from nerve.cli.experiment.machine import device_names, gpu_versions, n_processes_of
from nerve.cli.experiment.plan import Plan
from nerve.errors import ConfigError
from nerve.models import MODELS, build_model, model_design, scale_pre
from nerve.optim import build_optimizer
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore
from nerve.training.callbacks import RunProgressBar
from nerve.training.checkpoint_io import CheckpointFiles
from nerve.training.loggers import StoreLogger, wandb_id_in
from nerve.training.module import ImageClassifier, LanguageModel, TrainedModel
from nerve.training.monitor import FitMonitor

log = logging.getLogger(__name__)

NARROW = 8
"""Input features of an FFN below which the spectrum of pre has too few eigenvalues to compare."""

TASKS: dict[str, tuple[type[TrainedModel], str]] = {
    "gpt": (LanguageModel, "tokens"),
    "mixer": (ImageClassifier, "images"),
}
"""The Lightning module for each kind of model, and what its batches count."""


def build_data(plan: Plan) -> Any:
    """The data module, prepared: the model needs sizes that only the data knows.

    Relative paths start where the command was given, even if Hydra changed the directory.
    """
    given_in = HydraConfig.get().runtime.cwd if HydraConfig.initialized() else "."
    with chdir(given_in):
        data = build(plan.values["data"], key="data", **plan.data.sizes, seed=plan.seed)
        data.prepare_data()
        data.setup("fit")
    return data


def counts(described: Mapping[str, int | float | str]) -> str:
    """The data's description of itself, for the log: `n_…` as counts, other values by name."""
    return ", ".join(
        f"{_plain(value)} {name[2:].replace('_', ' ')}"
        if name.startswith("n_")
        else f"{name.replace('_', ' ')} {_plain(value)}"
        for name, value in described.items()
    )


def _plain(value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}"


def data_dims_of(data: Any, kind: str) -> dict[str, Any]:
    """What a model of that kind needs to know about the data, such as `vocab_size`."""
    return {name: getattr(data, name) for name in MODELS[kind].DATA_DIMS if hasattr(data, name)}


def build_module(plan: Plan, data_dims: Mapping[str, Any]) -> TrainedModel:
    """The model, with its loss, optimizer and schedule."""
    trained_model, _ = TASKS[plan.model.kind]
    return trained_model(
        build_model(plan.values, seed=plan.seed, **data_dims),
        lambda model: build_optimizer(model, plan.optimizer.parts),
        plan.optimizer.schedule,
        compile=plan.compile,
        regularizer=plan.regularizer,
    )


def warn_of_narrow_inputs(plan: Plan, data_dims: Mapping[str, Any]) -> None:
    """Logs the FFNs whose inputs have fewer than `NARROW` features: token mixing of few patches."""
    design = model_design(plan.values, **data_dims)
    for name in design.FFNS:
        d_in, d_ff = design.ffn_widths(name)
        if d_in < min(NARROW, d_ff):
            log.warning(
                "%s: its inputs have %d features, so at most %d of the %d eigenvalues of pre are "
                "not 0; for more patches, lower model.patch_size or raise data.image_size",
                name,
                d_in,
                d_in,
                d_ff,
            )


def scale_pre_activations(plan: Plan, module: TrainedModel, data: Any) -> dict[str, float]:
    """Scales the pre-activations of a newly initialized model to `model.pre_std`, if that is set.

    Every process uses the whole first batch, on the CPU, so that all get the same weights and a run
    does not depend on the number of processes. Returns the factors by FFN.
    """
    std = plan.model.design.pre_std
    if std is None:
        return {}
    inputs, _ = next(iter(data.train_dataloader()))
    return scale_pre(module.model, inputs, std)


def build_trainer(
    plan: Plan,
    directory: Path,
    store: RunStore | None,
    callbacks: list[L.Callback],
    files: CheckpointFiles,
    environment: ClusterEnvironment,
) -> L.Trainer:
    """The trainer, with the given loggers and callbacks in addition to those of the
    configuration."""
    if n_processes_of(plan.values["trainer"]) == 1:
        # Lightning has read the rank from the surrounding job, which may have several tasks.
        vars(rank_zero_only)["rank"] = 0
    loggers: list[Logger] = [
        build(node, key=f"logger.{name}") for name, node in plan.values["logger"].items()
    ]
    if store:
        loggers.insert(0, StoreLogger(store))
    callbacks = [*callbacks, *plan.callbacks]
    has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    if plan.trainer.enable_progress_bar and not has_bar:
        callbacks.append(RunProgressBar(TASKS[plan.model.kind][1]))
    trainer: L.Trainer = build(
        plan.values["trainer"],
        key="trainer",
        log_every_n_steps=min(plan.trainer.log_every_n_steps, plan.trainer.max_steps),
        callbacks=callbacks,
        logger=loggers,
        plugins=[files, environment],
        default_root_dir=str(directory),
        max_epochs=-1,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return trainer


def build_monitor(plan: Plan, store: RunStore | None) -> FitMonitor:
    """The monitor of the configuration; `store` as in `FitMonitor`."""
    return FitMonitor(store, **plan.monitor.settings)


def log_configuration(trainer: L.Trainer, plan: Plan) -> None:
    """Passes the configuration to the loggers, which starts those that write to a service.

    Raises:
        ConfigError: if one cannot start, for example without a login.
    """
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams(dict(plan.values))
        except Exception as error:  # it may be of any kind
            reason = str(error).strip().rstrip(".") or type(error).__name__
            raise ConfigError(
                f"A logger must be able to start; {type(logger).__name__} could not: {reason}. "
                "Fix that, or choose another with logger=csv."
            ) from error


def describe(
    record: RunRecord,
    module: TrainedModel,
    data: Any,
    trainer: L.Trainer,
    pre_scales: dict[str, float],
) -> None:
    """Adds to the record what is known once all parts are built."""
    record.update(
        n_parameters=sum(parameter.numel() for parameter in module.model.parameters()),
        fingerprints=data.fingerprints,
        unigram_loss=getattr(data, "unigram_loss", None),
        separator_token=getattr(data, "separator_token", None),
        wandb_id=wandb_id_in(trainer.loggers),
        device=device_names(trainer),
        versions=record.versions | gpu_versions(trainer),
        pre_scales=record.pre_scales | pre_scales,
    )
