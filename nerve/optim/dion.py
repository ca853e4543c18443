"""Dion: orthonormalized low-rank updates of matrices by power iteration with error feedback."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from nerve.config import require
from nerve.optim.closure import loss_of


class Dion(Optimizer):
    """Distributed orthonormalized updates, on one device.

    For a weight W of m outputs and n inputs, its gradient G, a momentum M (m × n, from 0) and a
    right factor V (n × r, kept from step to step, random at first), each step does

        B = M + G
        P = orth(B V)               QR: m × r, orthonormal columns
        R = Bᵀ P                    n × r
        M = B - (1 - μ) P Rᵀ        error feedback: only what the update used decays
        V = R with columns of unit length
        W = (1 - lr · weight_decay) W - lr · √(m/n) · P Vᵀ

    with r = round(rank_fraction · min(m, n)), at least 1. P Vᵀ has Frobenius norm √r, unless the
    rank of B is below r. At full rank P Rᵀ = B for every invertible V, so that M = μ B is ordinary
    momentum. While B keeps its direction, P and V converge to its singular vectors as the power
    iteration does, by (σ_{j+1}/σ_j)² per step, and at full rank P Vᵀ to the polar factor of B;
    until then the columns of V are not orthogonal, and P Vᵀ is not orthonormal.

    A column of R that is only rounding (at most max(m, n) machine epsilons of the longest one) has
    no direction: it adds nothing to the update, and V keeps its old column. This guard is ours; it
    is relative, so scaling the gradient changes nothing.

    M and V are float32 (float64 for float64 weights), m·n + n·r numbers per weight. No global
    random state is used: V starts from a generator seeded with the weight's index.

    Source: Ahn, Xu, Abreu and Langford, arXiv 2504.05295, Algorithm 1 with the scale √(m/n).

    Args:
        params: matrices, or groups of them.
        lr: learning rate, at least 0; the spectral norm of an orthonormal update before √(m/n).
        momentum: μ in [0, 1).
        rank_fraction: r over the smaller dimension, in (0, 1].
        weight_decay: decoupled, at least 0.

    Raises:
        ConfigError: for a parameter that is not a matrix, or a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.02,
        momentum: float = 0.95,
        rank_fraction: float = 0.5,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "rank_fraction": rank_fraction,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its values.

        Raises:
            ConfigError: as for the class.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for key, holds, rule in (
            ("lr", group["lr"] >= 0.0, "at least 0"),
            ("momentum", 0.0 <= group["momentum"] < 1.0, "in [0, 1)"),
            ("rank_fraction", 0.0 < group["rank_fraction"] <= 1.0, "in (0, 1]"),
            ("weight_decay", group["weight_decay"] >= 0.0, "at least 0"),
        ):
            require(holds, f"Dion's {key} must be {rule}; got {group[key]}.")
        for parameter in group["params"]:
            require(
                parameter.ndim == 2,
                f"Dion updates matrices only; got a parameter of shape {tuple(parameter.shape)}. "
                "Leave vectors and other tensors to another part of optimizer.parts.",
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs `closure` with gradients enabled, if given, and updates; returns its loss."""
        loss = loss_of(closure)
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, index)
                index += 1
        return loss

    def _update(self, weight: Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[weight]
        if not state:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            state["momentum"] = torch.zeros_like(weight, dtype=dtype)
            rank = max(1, round(group["rank_fraction"] * min(weight.shape)))
            state["right"] = _initial_right(weight.shape[1], rank, index).to(weight.device, dtype)
        buffer = state["momentum"].add_(weight.grad)
        left, unscaled, right = power_iteration(buffer, state["right"])
        buffer.addmm_(left, unscaled.T, alpha=group["momentum"] - 1.0)
        update = left @ right.T
        state["right"] = torch.where(right.any(dim=0), right, state["right"])
        n_out, n_in = weight.shape
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        weight.sub_(update.to(weight.dtype), alpha=group["lr"] * math.sqrt(n_out / n_in))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state in the stored precision; torch would cast it to the weights' dtype."""
        super().load_state_dict(dict(state_dict))
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, parameter in zip(indices, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][key] = value.to(parameter.device, copy=True)


def power_iteration(
    buffer: Float[Tensor, "n_out n_in"], right: Float[Tensor, "n_in rank"]
) -> tuple[Float[Tensor, "n_out rank"], Float[Tensor, "n_in rank"], Float[Tensor, "n_in rank"]]:
    """One step from the right factor V: P = orth(B V), R = Bᵀ P, and R with unit columns.

    P Rᵀ is B projected onto the columns of P. A column of R that is only rounding, compared with
    the longest one, is zero in the third matrix.
    """
    left, _ = torch.linalg.qr(buffer @ right)
    unscaled = buffer.T @ left
    lengths = torch.linalg.vector_norm(unscaled, dim=0)
    rounding = torch.finfo(buffer.dtype).eps * max(buffer.shape) * lengths.max()
    unit = torch.where(lengths > rounding, unscaled / lengths, torch.zeros_like(unscaled))
    return left, unscaled, unit


def _initial_right(n_in: int, rank: int, index: int) -> Float[Tensor, "n_in rank"]:
    """Standard normal numbers that depend only on the arguments; drawn on the CPU."""
    return torch.randn(n_in, rank, generator=torch.Generator().manual_seed(index))
