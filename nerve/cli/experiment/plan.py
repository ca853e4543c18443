"""The plan of a run: its configuration, checked once, before a directory, a lock or any data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from hydra.utils import get_class
from omegaconf import DictConfig

from nerve.cli.config.compose import resolved, unresolved
from nerve.cli.experiment.checks import (
    require_arguments,
    require_data,
    require_given,
    require_packages,
    require_positions,
    require_readable_weight,
    require_single_values,
    require_suited,
    require_tokens_of_text,
    require_whole,
    require_whole_matrices,
)
from nerve.cli.experiment.groups import (
    DataPlan,
    ModelPlan,
    MonitorPlan,
    OptimizerPlan,
    TrainerPlan,
    parts_of,
    require_devices,
    require_paths_of_data,
    schedule_of,
)
from nerve.cli.experiment.objective import callbacks_of, check_objective
from nerve.config import from_mapping
from nerve.models import Regularizer
from nerve.training.checkpoint_io import CheckpointCadence


@dataclass(frozen=True)
class Plan:
    """A run as its configuration describes it. What it holds can be run, so far as that can be told
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
        """The plan of a composed configuration, without Hydra's own node.

        What costs least is looked at first: single values, the data module, then the network on the
        meta device, and the optimizers of its parameters.

        Raises:
            ConfigError: for all that a configuration alone can tell to be wrong, naming the keys.
            NerveError: for what a part of the run refuses, in its words.
        """
        given = unresolved(config)
        require_whole(given)
        require_suited(config)
        require_given(given)
        values = resolved(config)
        kind = values["model"]["kind"]
        require_single_values(values)
        require_devices(values["trainer"])
        require_whole_matrices(values)
        check_objective(values["objective"], kind)
        trainer = TrainerPlan.of(values["trainer"])
        require_arguments("trainer", get_class(values["trainer"]["_target_"]), values["trainer"])
        checkpoint = from_mapping(CheckpointCadence, values["checkpoint"], "checkpoint")
        checkpoint.require_reached(trainer.max_steps)
        schedule = schedule_of(values["optimizer"])
        monitor = from_mapping(MonitorPlan, values["monitor"], "monitor")
        monitor.require_reached(trainer.max_steps)
        require_tokens_of_text(monitor.n_tokens, kind)
        require_positions(monitor, values)
        require_readable_weight(monitor, values)
        require_packages(values["logger"])
        callbacks = callbacks_of(values)
        data = DataPlan.of(trainer, monitor, kind, widest=1)
        require_paths_of_data(values["data"])
        require_data(values["data"], data.sizes, values["seed"])
        model = ModelPlan.of(values)
        regularizer = from_mapping(Regularizer, values["regularizer"], "regularizer")
        regularizer.ffns(model.skeleton)
        widest = max(model.widths(monitor.layers))
        return cls(
            values=values,
            model=model,
            data=DataPlan.of(trainer, monitor, kind, widest),
            optimizer=OptimizerPlan(parts_of(values["optimizer"], model.skeleton), schedule),
            trainer=trainer,
            monitor=monitor,
            checkpoint=checkpoint,
            callbacks=callbacks,
            regularizer=regularizer,
        )

    @property
    def objective(self) -> str:
        """The number that the run returns."""
        return str(self.values["objective"])

    @property
    def seed(self) -> int:
        """Of the weights and of the order of the data."""
        return int(self.values["seed"])

    @property
    def threads(self) -> int | None:
        """CPU threads of torch; None leaves its own choice."""
        threads: int | None = self.values["threads"]
        return threads

    @property
    def compile(self) -> bool:
        """Whether the network is compiled."""
        return bool(self.values["compile"])
