"""The machine of a run: what the run needs, whether the machine has it, and its description."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.utilities import rank_zero_only

from nerve import cores
from nerve.cli.experiment.group_plans import seq_len_of
from nerve.cli.experiment.plan import Plan
from nerve.cli.experiment.trainer import n_devices_of
from nerve.config import require
from nerve.measuring.projection import PROJECTED
from nerve.optim import Dion, parameter_roles
from nerve.sites_and_groups import GROUPINGS
from nerve.storage.provenance import nvidia_driver
from nerve.training.gathering import Gathering
from nerve.training.launching import environment_of

COUNTED = (
    "Memory counts parameters, gradients, the optimizer's state and the monitor's covariance "
    "matrices (float64), all on one device; not activations, batches and the memory of the "
    "eigensolver."
)

_RANK_FRACTION: float = signature(Dion).parameters["rank_fraction"].default

State = Callable[[int, int, Mapping[str, Any]], float]

STATES: dict[str, State] = {
    "AdamW": lambda m, n, _: 2 * m * n,
    "SGD": lambda m, n, build: m * n if build.get("momentum") else 0,
    "Adafactor": lambda m, n, _: m + n if m > 1 else n,
    "Muon": lambda m, n, _: m * n,
    "Dion": lambda m, n, build: (
        m * n + n * max(1, round(build.get("rank_fraction", _RANK_FRACTION) * min(m, n)))
    ),
    "SOAP": lambda m, n, _: 2 * m * n + 2 * (m * m + n * n),
    "Shampoo": lambda m, n, _: m * n + 2 * (m * m + n * n),
}
"""For the last name of an optimizer's `_target_`: how many numbers of state it keeps for an m × n
matrix (m = 1 for a vector), given its values."""


def check_machine(plan: Plan) -> None:
    """Refuses a run if this machine has no suitable device."""
    accelerator = plan.values["trainer"].get("accelerator")
    require(
        accelerator not in ("gpu", "cuda") or CUDAAccelerator.is_available(),
        f"trainer.accelerator={accelerator} needs a GPU; torch {torch.__version__} finds none that "
        "it can use (spectra need float64, which Apple GPUs do not support). Use trainer=cpu, or "
        "install torch for this machine's GPU.",
    )
    require(
        accelerator != "auto"
        or CUDAAccelerator.is_available()
        or not MPSAccelerator.is_available(),
        "trainer.accelerator=auto selects the Apple GPU of this machine, which does not support "
        "float64, in which spectra are computed. Use trainer=cpu.",
    )
    require_memory(plan, _device_bytes(accelerator))


def require_memory(plan: Plan, has_bytes: int) -> None:
    """Refuses a run that does not fit into a device with `has_bytes` of memory."""
    trainer = plan.values["trainer"]
    n_devices = n_devices_of(trainer) or max(1, torch.cuda.device_count())
    needs_bytes = least_memory(plan, n_devices * trainer.get("num_nodes", 1))
    require(
        needs_bytes <= has_bytes,
        f"A run must fit into its device; weights, gradients and logits of this one need at least "
        f"{needs_bytes / 1e9:,.0f} GB, and it has {has_bytes / 1e9:,.0f} GB. Lower the largest of "
        f"data.batch_size={plan.values['data'].get('batch_size')}, "
        f"data.vocab_size={plan.values['data'].get('vocab_size')} and the sizes in model and ffn.",
    )


def _device_bytes(accelerator: str) -> int:
    """Memory of the largest device that a run may use, including the host's swap space."""
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
    return cores.memory() + swap


@dataclass(frozen=True)
class Estimate:
    """Size estimates for a run.

    Attributes:
        n_parameters: None if it depends on the data.
        memory_bytes: as described by `COUNTED`; None likewise, or for an unknown optimizer.
    """

    n_parameters: int | None
    memory_bytes: float | None

    @classmethod
    def of(cls, plan: Plan) -> "Estimate":
        """Creates it from a plan."""
        if plan.model.n_unknown:
            return cls(None, None)
        n_parameters = plan.model.skeleton.n_parameters
        n_state = _n_state(plan)
        if n_state is None:
            return cls(n_parameters, None)
        weights = plan.trainer.bytes_per_weight * (2 * n_parameters + n_state)
        return cls(n_parameters, weights + 8 * _n_covariances(plan))


def least_memory(plan: Plan, n_processes: int) -> int:
    """A lower bound on the memory that a run needs on each of its devices.

    It counts weights and gradients, which exist at the same time in every step, unless they are
    sharded; and for a batch the logits and one layer's features, in 16 bits.
    """
    values = plan.values
    n_parameters = plan.model.skeleton.n_parameters
    whole = str(values["trainer"]["strategy"]).startswith(("auto", "ddp"))
    weights = 2 * plan.trainer.bytes_per_weight * n_parameters if whole else 0
    batch_size, seq_len = values["data"].get("batch_size"), seq_len_of(values["data"])
    if plan.model.kind != "gpt" or not isinstance(batch_size, int) or seq_len is None:
        return weights
    positions = batch_size // n_processes * seq_len
    vocab_size = 0 if plan.compile else plan.model.data_dims["vocab_size"]
    return weights + 2 * positions * (vocab_size + values["model"]["d_model"])


def _n_state(plan: Plan) -> float | None:
    parts = plan.values["optimizer"]["parts"]
    of_role = {
        role: parts[name]["build"]
        for name, part in plan.optimizer.parts.items()
        for role in part.roles
    }
    skeleton, total = plan.model.skeleton, 0.0
    roles = parameter_roles(skeleton.network)
    for name, parameter, n_alike in skeleton.parameters():
        build = of_role[roles[name]]
        state = STATES.get(build.get("_target_", "").rpartition(".")[2])
        if state is None:
            return None
        n = parameter.shape[-1]
        total += n_alike * state(parameter.numel() // n, n, build)
    return total


def _n_covariances(plan: Plan) -> int:
    """Number of matrix entries for all measured FFNs: pre and post, their groups, and the sites
    around them."""
    total, monitor = 0, plan.monitor
    n_groups = sum(len(GROUPINGS[name]) for name in monitor.groups) + bool(monitor.groups)
    for d_in, width in plan.model.ffn_widths:
        # For 16-bit features, pre itself is measured, not the input, unless it is to be projected.
        is_exact = plan.trainer.has_exact_features or monitor.shortcut == PROJECTED
        of_input = monitor.shortcut and is_exact
        of_ffn = width**2 + (d_in if of_input else width) ** 2
        total += of_ffn * max(1, n_groups) + len(monitor.sites) * d_in**2
    n_layers = len(plan.model.layers) if monitor.layers is None else len({*monitor.layers})
    return n_layers * total


def n_processes_of(trainer: Mapping[str, Any]) -> int:
    """Number of processes that a run requests.

    The surrounding job may have others: `srun` tasks that each run a command of their own.

    Args:
        trainer: values of the group `trainer`.
    """
    n_devices = n_devices_of(trainer)
    if n_devices is None:
        n_devices = 1 if trainer["accelerator"] == "cpu" else max(1, torch.cuda.device_count())
    return n_devices * int(trainer.get("num_nodes", 1))


def leads(trainer: Mapping[str, Any]) -> bool:
    """Whether this process records the run: the first of several processes, or the only one."""
    is_alone = n_processes_of(trainer) == 1
    return is_alone or bool(vars(rank_zero_only)["rank"] == 0)


def gathering_of(trainer: Mapping[str, Any]) -> Gathering:
    """Where the processes of a run meet before the process group exists."""
    n_processes = n_processes_of(trainer)
    return Gathering(environment_of(n_processes == 1), n_processes, leads(trainer))


def device_names(trainer: L.Trainer) -> str:
    """The devices as recorded in run.json: each GPU of this node with its name."""
    root = trainer.strategy.root_device
    if root.type != "cuda":
        return str(root)
    gpus = [torch.device("cuda", index) for index in trainer.device_ids]
    names = ", ".join(f"{gpu} ({torch.cuda.get_device_name(gpu)})" for gpu in gpus)
    return names + (f" on each of {trainer.num_nodes} nodes" if trainer.num_nodes > 1 else "")


def gpu_versions(trainer: L.Trainer) -> dict[str, str]:
    """The versions of CUDA and NVIDIA's driver."""
    if trainer.strategy.root_device.type != "cuda":
        return {}
    versions = {"cuda": torch.version.cuda, "nvidia-driver": nvidia_driver()}
    return {name: version for name, version in versions.items() if version is not None}
