"""The machine that a run is on: whether it has the devices, and what they are."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.utilities import rank_zero_only

from nerve.cli.experiment.devices import n_devices_of
from nerve.cli.experiment.estimate import least_memory
from nerve.cli.experiment.plan import Plan
from nerve.config import require
from nerve.storage.provenance import nvidia_driver
from nerve.training.gathering import Gathering, environment_of


def check_machine(plan: Plan) -> None:
    """Refuses a run that this machine has no device for."""
    accelerator = plan.values["trainer"].get("accelerator")
    require(
        accelerator not in ("gpu", "cuda") or CUDAAccelerator.is_available(),
        f"trainer.accelerator={accelerator} needs a GPU; torch {torch.__version__} finds none that "
        "it can use (Apple's have no float64, in which spectra are taken). Take trainer=cpu, or "
        "install torch for this machine's GPU.",
    )
    require(
        accelerator != "auto"
        or CUDAAccelerator.is_available()
        or not MPSAccelerator.is_available(),
        "trainer.accelerator=auto takes the GPU of this machine, which is Apple's and has no "
        "float64, in which spectra are taken. Take trainer=cpu.",
    )
    require_memory(plan, _device_bytes(accelerator))


def require_memory(plan: Plan, has_bytes: int) -> None:
    """Refuses a run that does not fit into a device that has that many bytes."""
    trainer = plan.values["trainer"]
    n_devices = n_devices_of(trainer) or max(1, torch.cuda.device_count())
    needs_bytes = least_memory(plan, n_devices * trainer.get("num_nodes", 1))
    require(
        needs_bytes <= has_bytes,
        f"A run must fit into its device; weights, gradients and logits of this one take at least "
        f"{needs_bytes / 1e9:,.0f} GB, and it has {has_bytes / 1e9:,.0f} GB. Lower the largest of "
        f"data.batch_size={plan.values['data'].get('batch_size')}, "
        f"data.vocab_size={plan.values['data'].get('vocab_size')} and the sizes in model and ffn.",
    )


def _device_bytes(accelerator: str) -> int:
    """Memory of the largest device that a run may take, with what the host may swap out."""
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return max(
            torch.cuda.get_device_properties(i).total_memory
            for i in range(torch.cuda.device_count())
        )
    swap = 0
    with suppress(OSError):
        swap = sum(
            1024 * int(line.split()[1])
            for line in Path("/proc/meminfo").read_text().splitlines()
            if line.startswith("SwapTotal")
        )
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + swap


def n_processes_of(trainer: Mapping[str, Any]) -> int:
    """How many processes a run is, by what it asks for.

    The job around it may have others: tasks of `srun` that each run a command of their own.

    Args:
        trainer: values of the group `trainer`.
    """
    n_devices = n_devices_of(trainer)
    if n_devices is None:
        n_devices = 1 if trainer["accelerator"] == "cpu" else max(1, torch.cuda.device_count())
    return n_devices * int(trainer.get("num_nodes", 1))


def leads(trainer: Mapping[str, Any]) -> bool:
    """Whether this process records the run: of several processes the first, of one that one."""
    is_alone = n_processes_of(trainer) == 1
    return is_alone or rank_zero_only.rank == 0  # type: ignore[attr-defined]


def gathering_of(trainer: Mapping[str, Any]) -> Gathering:
    """Where the processes of a run meet before they are one group."""
    n_processes = n_processes_of(trainer)
    return Gathering(environment_of(n_processes == 1), n_processes, leads(trainer))


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
