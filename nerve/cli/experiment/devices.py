"""The devices that a run asks for, read from its values alone, against what a launcher gives it.

torch takes seconds to import: it is asked only where the number of GPUs matters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nerve.config import require

SUBMITIT_SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
"""The launcher that sends trials to SLURM."""


def n_devices_of(trainer: Mapping[str, Any]) -> int | None:
    """How many there are on each node; None where Lightning is to find out.

    Args:
        trainer: values of the group `trainer`.
    """
    devices = trainer["devices"]
    if isinstance(devices, int | str) and str(devices).isdigit():
        return int(devices)
    return None if isinstance(devices, str) or not isinstance(devices, Sequence) else len(devices)


def check_devices(trainer: Mapping[str, Any], launcher: Mapping[str, Any]) -> None:
    """Refuses a trial whose processes or GPUs would not be there.

    Args:
        trainer: `trainer` of the trial.
        launcher: `hydra.launcher` of the sweep; jobs of SLURM are compared with what they ask for,
            any other launcher gives a trial one process.

    Raises:
        ConfigError: naming the keys that do not fit together.
    """
    if launcher["_target_"] == SUBMITIT_SLURM:
        _check_job(trainer, launcher)
        return
    n_devices = n_devices_of(trainer)
    if n_devices is None and trainer["accelerator"] != "cpu":
        import torch

        n_devices = torch.cuda.device_count()
    require(
        n_devices in (None, 0, 1) and trainer.get("num_nodes", 1) == 1,
        "In a sweep on this machine each trial is one process; "
        f"trainer.strategy={trainer['strategy']} with trainer.devices={trainer['devices']} starts "
        "more, each of which would repeat the whole command. Use trainer.devices=1, submit the "
        "sweep to a cluster with hydra/launcher=slurm, or start each run without --multirun.",
    )


def check_counted(trainer: Mapping[str, Any]) -> None:
    """Refuses a job of SLURM of unknown size.

    Raises:
        ConfigError: for `trainer.devices` that is no number.
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
    if trainer["accelerator"] == "cpu" or launcher.get("gres"):
        return
    a_task = launcher.get("gpus_per_task") or 0
    n_gpus = launcher.get("gpus_per_node") or a_task * launcher["tasks_per_node"]
    require(
        n_gpus >= n_devices,
        f"A job gets only the GPUs that it requests; trainer.accelerator={trainer['accelerator']} "
        f"with trainer.devices={trainer['devices']} needs "
        f" hydra.launcher.gpus_per_node={n_devices}, "
        f"got {launcher.get('gpus_per_node')}.",
    )
