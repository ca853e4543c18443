"""What a run would take of memory, estimated from its plan."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nerve.cli.experiment.groups import width_of
from nerve.cli.experiment.plan import Plan
from nerve.measuring.ffns import n_inputs, sites_of
from nerve.measuring.find import find_ffns
from nerve.measuring.projection import PROJECTED
from nerve.metric_names import GROUPS
from nerve.optim import parameter_roles

COUNTED = (
    "Memory counts parameters, gradients, the optimizer's state and the monitor's covariance "
    "matrices (float64), all on one device; not activations, batches and what solves the "
    "eigenproblems."
)

State = Callable[[int, int, Mapping[str, Any]], float]

STATES: dict[str, State] = {
    "AdamW": lambda m, n, _: 2 * m * n,
    "SGD": lambda m, n, build: m * n if build.get("momentum") else 0,
    "Adafactor": lambda m, n, _: m + n if m > 1 else n,
    "Muon": lambda m, n, _: m * n,
    "Dion": lambda m, n, build: m * n + n * max(1, round(build["rank_fraction"] * min(m, n))),
    "SOAP": lambda m, n, _: 2 * m * n + 2 * (m * m + n * n),
    "Shampoo": lambda m, n, _: m * n + 2 * (m * m + n * n),
}
"""The last name of an optimizer's `_target_` to the numbers that it keeps of an m × n matrix (a
vector: m = 1), with its values."""


@dataclass(frozen=True)
class Estimate:
    """Sizes of a run.

    Attributes:
        n_parameters: None where only the data can tell.
        memory_bytes: what `COUNTED` says; None likewise, or for an optimizer that is not known.
    """

    n_parameters: int | None
    memory_bytes: float | None

    @classmethod
    def of(cls, plan: Plan) -> "Estimate":
        """That of a plan."""
        if plan.model.n_unknown:
            return cls(None, None)
        skeleton = plan.model.skeleton
        n_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
        n_state = _n_state(plan, skeleton)
        if n_state is None:
            return cls(n_parameters, None)
        a_number = 2 if str(plan.values["trainer"].get("precision")).endswith("16-true") else 4
        weights = a_number * (2 * n_parameters + n_state)
        return cls(n_parameters, weights + 8 * _n_covariances(plan, skeleton))


def least_memory(plan: Plan, n_processes: int) -> int:
    """Bytes that a run takes at least on each of its devices: less than it does, never more.

    Its weights with their gradients, which stand beside each other at every step, where no process
    has a part of them alone; and of the batch the logits and one layer's features, in 16 bits.
    """
    values = plan.values
    a_number = 2 if str(values["trainer"].get("precision")).endswith("16-true") else 4
    n_parameters = sum(parameter.numel() for parameter in plan.model.skeleton.parameters())
    whole = str(values["trainer"]["strategy"]).startswith(("auto", "ddp"))
    weights = 2 * a_number * n_parameters if whole else 0
    batch_size = values["data"].get("batch_size")
    if plan.model.kind != "gpt" or not isinstance(batch_size, int):
        return weights
    positions = batch_size // n_processes * values["model"]["seq_len"]
    vocab_size = 0 if plan.compile else plan.model.data_dims["vocab_size"]
    return weights + 2 * positions * (vocab_size + values["model"]["d_model"])


def _n_state(plan: Plan, skeleton: nn.Module) -> float | None:
    parts = plan.values["optimizer"]["parts"]
    of_role = {
        role: parts[name]["build"]
        for name, part in plan.optimizer.parts.items()
        for role in part.roles
    }
    roles, total = parameter_roles(skeleton), 0.0
    for name, parameter in skeleton.named_parameters():
        build = of_role[roles[name]]
        state = STATES.get(build.get("_target_", "").rpartition(".")[2])
        if state is None:
            return None
        n = parameter.shape[-1]
        total += state(parameter.numel() // n, n, build)
    return total


def _n_covariances(plan: Plan, skeleton: nn.Module) -> int:
    """Numbers in the matrices of every measured FFN: of pre and post, of their groups, and of the
    sites around them."""
    total, monitor = 0, plan.monitor
    n_groups = sum(len(GROUPS[name]) for name in monitor.groups) + bool(monitor.groups)
    for ffn in find_ffns(skeleton, layers=monitor.layers):
        width, d_in = width_of(ffn), n_inputs(sites_of(ffn)[0])
        assert isinstance(d_in, int)
        # Of 16-bit features pre itself is taken, not the input, unless it is to be projected.
        exact = str(plan.values["trainer"].get("precision")).startswith("32")
        of_input = monitor.shortcut and (exact or monitor.shortcut == PROJECTED)
        of_ffn = width**2 + (d_in if of_input else width) ** 2
        total += of_ffn * max(1, n_groups) + len(monitor.sites) * d_in**2
    return total
