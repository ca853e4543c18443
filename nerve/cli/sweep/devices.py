"""Whether a trial gets the processes and GPUs that it requests from the launcher of its sweep."""

from collections.abc import Mapping
from typing import Any

import torch

from nerve.cli.config.compose import SUBMITIT_SLURM
from nerve.cli.experiment.trainer import n_devices_of
from nerve.config import require

_GPUS_OF_SBATCH = {"gres", "gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task"}
"""Options of sbatch that request GPUs, in whatever form a cluster wants."""


def check_devices(trainer: Mapping[str, Any], launcher: Mapping[str, Any]) -> None:
    """Refuses a trial that would not get its processes or GPUs.

    Args:
        trainer: `trainer` of the trial.
        launcher: `hydra.launcher` of the sweep; SLURM jobs are checked against their request,
            any other launcher gives a trial one process.

    Raises:
        ConfigError: naming the keys that conflict.
    """
    if launcher["_target_"] == SUBMITIT_SLURM:
        _check_job(trainer, launcher)
        return
    n_devices = n_devices_of(trainer)
    if n_devices is None and trainer["accelerator"] != "cpu":
        n_devices = torch.cuda.device_count()
    require(
        n_devices in (None, 0, 1) and trainer.get("num_nodes", 1) == 1,
        "In a sweep on this machine each trial is one process; "
        f"trainer.strategy={trainer['strategy']} with trainer.devices={trainer['devices']} starts "
        "more, each of which would repeat the whole command. Use trainer.devices=1, submit the "
        "sweep to a cluster with hydra/launcher=slurm, or start each run without --multirun.",
    )


def check_counted(trainer: Mapping[str, Any]) -> None:
    """Refuses a SLURM job of unknown size.

    Raises:
        ConfigError: if `trainer.devices` is not a number.
    """
    require(
        n_devices_of(trainer) is not None,
        "A SLURM job must state its number of devices; got "
        f"trainer.devices={trainer['devices']}. Give a number, the same for all trials.",
    )


def _check_job(trainer: Mapping[str, Any], launcher: Mapping[str, Any]) -> None:
    check_counted(trainer)
    n_devices, n_nodes = n_devices_of(trainer), trainer.get("num_nodes", 1)
    assert n_devices is not None
    for key, expected, of in (
        ("tasks_per_node", n_devices, f"trainer.devices={trainer['devices']}"),
        ("nodes", n_nodes, f"trainer.num_nodes={n_nodes}"),
    ):
        require(
            launcher[key] == expected,
            f"SLURM starts one process per device; {of} needs hydra.launcher.{key}={expected}, got "
            f"{launcher[key]}.",
        )
    options = launcher.get("additional_parameters") or {}
    _check_options(options)
    more = {name.replace("_", "-") for name, value in options.items() if value}
    if trainer["accelerator"] == "cpu" or launcher.get("gres") or more & _GPUS_OF_SBATCH:
        return
    a_task = launcher.get("gpus_per_task") or 0
    n_gpus = launcher.get("gpus_per_node") or a_task * launcher["tasks_per_node"]
    require(
        n_gpus >= n_devices,
        f"A job gets only the GPUs that it requests; trainer.accelerator={trainer['accelerator']} "
        f"with trainer.devices={trainer['devices']} needs "
        f"hydra.launcher.gpus_per_node={n_devices}, "
        f"got {launcher.get('gpus_per_node')}.",
    )


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuses options of sbatch whose values submitit would turn into text, such as False."""
    for name, value in options.items():
        key = f"hydra.launcher.additional_parameters.{name}"
        require(
            value is True or (isinstance(value, str | int | float) and value is not False),
            f"An option of sbatch has a text or a number, or is true if it takes no value; got "
            f"{key}={value!r}. Write it as sbatch reads it, or leave it out with ~{key}.",
        )
