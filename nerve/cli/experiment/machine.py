"""The machine that a run is on: whether it has the devices, and what they are."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.utilities import rank_zero_only

from nerve.cli.experiment.plan import Plan
from nerve.cli.sweep.devices import n_devices_of
from nerve.config import require
from nerve.storage.provenance import nvidia_driver


def check_machine(plan: Plan) -> None:
    """Refuses a run that this machine has no device for."""
    accelerator = plan.values["trainer"].get("accelerator")
    require(
        accelerator not in ("gpu", "cuda") or _has_gpu(),
        f"trainer.accelerator={accelerator} needs a GPU; torch {torch.__version__} finds none that "
        "it can use. Take trainer=cpu, or install torch for this machine's GPU.",
    )


def is_alone(trainer: Mapping[str, Any]) -> bool:
    """Whether a run is one process, by what it asks for.

    The job around it may have others: tasks of `srun` that each run a command of their own.

    Args:
        trainer: values of the group `trainer`.
    """
    n_devices = n_devices_of(trainer)
    if n_devices is None:
        n_devices = 1 if trainer["accelerator"] == "cpu" else max(1, torch.cuda.device_count())
    return n_devices == 1 and trainer.get("num_nodes", 1) == 1


def leads(trainer: Mapping[str, Any]) -> bool:
    """Whether this process records the run: of several processes the first, of one that one."""
    if is_alone(trainer):
        rank_zero_only.rank = 0  # type: ignore[attr-defined]  # from variables of the job
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def _has_gpu() -> bool:
    return CUDAAccelerator.is_available() or MPSAccelerator.is_available()


def device_names(trainer: L.Trainer) -> str:
    """The devices as run.json has them: each GPU of this node with what it is."""
    root = trainer.strategy.root_device
    if root.type != "cuda":
        return str(root)
    gpus = [torch.device("cuda", index) for index in trainer.device_ids]
    names = ", ".join(f"{gpu} ({torch.cuda.get_device_name(gpu)})" for gpu in gpus)
    return names + (f" on each of {trainer.num_nodes} nodes" if trainer.num_nodes > 1 else "")


def gpu_versions(trainer: L.Trainer) -> dict[str, str]:
    """What computes on a GPU beside packages: CUDA and NVIDIA's driver."""
    if trainer.strategy.root_device.type != "cuda":
        return {}
    versions = {"cuda": torch.version.cuda, "nvidia-driver": nvidia_driver()}
    return {name: version for name, version in versions.items() if version is not None}
