"""The plan of a run: its configuration, checked once, before there is a directory, a lock or any
data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ProgressBar
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nerve.cli.config.compose import build, resolved, unresolved
from nerve.cli.config.explain import explain_unresolved
from nerve.cli.experiment.arguments import require_data, require_trainer
from nerve.cli.experiment.checks import (
    require_given,
    require_groups,
    require_named_optimizer,
    require_packages,
    require_parts,
    require_positions,
    require_readable_weight,
    require_single_values,
    require_suited,
    require_tokens_of_text,
    require_whole,
    require_whole_matrices,
)
from nerve.cli.experiment.group_plans import (
    DataPlan,
    ModelPlan,
    MonitorPlan,
    OptimizerPlan,
    parts_of,
    require_paths_of_data,
    schedule_of,
)
from nerve.cli.experiment.trainer import TrainerPlan, require_devices
from nerve.config import from_mapping, require, require_choice, require_layers
from nerve.errors import ConfigError
from nerve.metric_names import MEASURED
from nerve.models import MODELS, Regularizer
from nerve.recording.writer import layer_name, mean_name
from nerve.training.checkpoint_io import CheckpointCadence

SCORES = {"gpt": ("val_loss", "bits_per_byte"), "mixer": ("val_loss", "val_accuracy")}
"""The final scores in `run.json` for each kind of model."""


@dataclass(frozen=True)
class Plan:
    """A run as described by its configuration. A plan can be run, as far as that can be determined
    without the data and the machine.

    Attributes:
        values: the configuration, resolved, as the record and the loggers have it; what `_target_`
            names is built from it.
        model, data, optimizer, trainer, monitor, checkpoint, regularizer: the groups of these
            names.
        callbacks: those of the group of this name, built.
    """

    values: Mapping[str, Any]
    model: ModelPlan
    data: DataPlan
    optimizer: OptimizerPlan
    trainer: TrainerPlan
    monitor: MonitorPlan
    checkpoint: CheckpointCadence
    callbacks: Sequence[L.Callback]
    regularizer: Regularizer

    @classmethod
    def of(cls, config: DictConfig) -> "Plan":
        """Creates the plan of a composed configuration, without Hydra's own node.

        The cheapest checks come first: single values, the data module, then the network's
        parameters, without allocating them, and their optimizers.

        Raises:
            ConfigError: for every error that shows in the configuration alone, naming the keys.
            NerveError: as raised by a part of the run.
        """
        given = unresolved(config)
        require_whole(given)
        require_suited(config)
        require_given(given)
        try:
            values = resolved(config)
        except OmegaConfBaseException as error:
            raise ConfigError(explain_unresolved(error)) from error
        require_groups(values)
        kind = values["model"]["kind"]
        require_single_values(values)
        require_devices(values["trainer"])
        require_parts(values["optimizer"])
        require_whole_matrices(values)
        check_objective(values["objective"], kind)
        trainer = TrainerPlan.of(values["trainer"])
        require_trainer(values["trainer"], known=[each.name for each in fields(TrainerPlan)])
        checkpoint = from_mapping(CheckpointCadence, values["checkpoint"], "checkpoint")
        checkpoint.require_reached(trainer.max_steps)
        require_named_optimizer(values["optimizer"])
        schedule = schedule_of(values["optimizer"])
        monitor = from_mapping(MonitorPlan, values["monitor"], "monitor")
        monitor.require_reached(trainer.max_steps)
        require_tokens_of_text(monitor.n_tokens, kind)
        require_positions(monitor, values)
        require_packages(values["logger"])
        callbacks = callbacks_of(values)
        data = DataPlan.of(trainer, monitor, kind, widest=1)
        require_paths_of_data(values["data"])
        require_data(values["data"], data.sizes, values["seed"])
        model = ModelPlan.of(values)
        require_readable_weight(monitor, model.design.ffn.constraint, trainer)
        regularizer = from_mapping(Regularizer, values["regularizer"], "regularizer")
        require_layers("monitor.layers", monitor.layers, model.layers)
        if regularizer.name != "none":
            require_layers("regularizer.layers", regularizer.layers, model.layers)
        widest = max(d_ff for _, d_ff in model.ffn_widths)
        return cls(
            values=values,
            model=model,
            data=DataPlan.of(trainer, monitor, kind, widest),
            optimizer=OptimizerPlan(
                parts_of(values["optimizer"], model.skeleton.network), schedule
            ),
            trainer=trainer,
            monitor=monitor,
            checkpoint=checkpoint,
            callbacks=callbacks,
            regularizer=regularizer,
        )

    @property
    def objective(self) -> str:
        """The name of the number that the run returns."""
        return str(self.values["objective"])

    @property
    def seed(self) -> int:
        """The seed of the weights and of the data order."""
        return int(self.values["seed"])

    @property
    def threads(self) -> int | None:
        """Number of CPU threads for torch; None leaves it to torch."""
        threads: int | None = self.values["threads"]
        return threads

    @property
    def compile(self) -> bool:
        """Whether the network is compiled."""
        return bool(self.values["compile"])


def check_objective(name: str, kind: str) -> None:
    """Refuses a name for which a run with a model of that kind has no number.

    Raises:
        ConfigError: with the valid names.
    """
    if name not in SCORES[kind]:
        require_choice("objective", name, objectives(kind))


def objectives(kind: str) -> tuple[str, ...]:
    """The names of the numbers that a run with a model of that kind ends with."""
    means = (mean_name(ffn, metric) for ffn in ffns_of(kind) for metric in MEASURED)
    return (*SCORES[kind], *MEASURED, *means)


def ffns_of(kind: str) -> tuple[str, ...]:
    """Names of the FFNs in each layer of a model of that kind."""
    return MODELS[kind].Config.FFNS


def of_layers(kind: str, layers: Iterable[int]) -> set[str]:
    """The names of per-layer values that callbacks of such a run can monitor."""
    return {
        layer_name(ffn, layer, metric)
        for ffn in ffns_of(kind)
        for layer in layers
        for metric in MEASURED
    }


def callbacks_of(values: Mapping[str, Any]) -> list[L.Callback]:
    """Builds the callbacks of a configuration.

    Raises:
        ConfigError: for what is not a callback, monitors what no such run logs, or changes what
            the run itself controls.
    """
    callbacks = [_callback(name, node) for name, node in values["callbacks"].items()]
    for name, callback in zip(values["callbacks"], callbacks, strict=True):
        require(
            not isinstance(callback, GradientAccumulationScheduler),
            "A run accumulates gradients over the same number of batches at every step; "
            f"callbacks.{name} changes it between epochs. Set "
            "trainer.accumulate_grad_batches.",
        )
    bars = [
        f"callbacks.{name}"
        for name, callback in zip(values["callbacks"], callbacks, strict=True)
        if isinstance(callback, ProgressBar)
    ]
    shows = values["trainer"].get("enable_progress_bar", True)
    require(
        len(bars) <= int(bool(shows)),
        f"A run shows at most one progress bar; got {' and '.join(bars)} with "
        f"trainer.enable_progress_bar={str(shows).lower()}. Leave one out, or set that to true.",
    )
    # A callback of one's own may log what another one monitors.
    if all(type(callback).__module__.startswith("lightning.") for callback in callbacks):
        kind = values["model"]["kind"]
        layers = range(n) if isinstance(n := values["model"].get("n_layers"), int) else ()
        for name, callback in zip(values["callbacks"], callbacks, strict=True):
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in of_layers(kind, layers):
                logged = ("train_loss", "penalty", *objectives(kind))
                require_choice(f"callbacks.{name}.monitor", monitor, logged)
    return callbacks


def _callback(name: str, node: Any) -> L.Callback:
    key = f"callbacks.{name}"
    require(
        isinstance(node, Mapping) and "_target_" in node,
        f"{key} must be a mapping with the class of a callback under _target_; got {node!r}.",
    )
    callback = build(node, key=key)
    require(
        isinstance(callback, L.Callback),
        f"{key}._target_ must name a Lightning callback; {node['_target_']} gives "
        f"{type(callback).__name__}.",
    )
    assert isinstance(callback, L.Callback)
    return callback
