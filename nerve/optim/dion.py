"""Dion: orthonormalized low-rank updates of matrices by power iteration with error feedback, for
all matrices of one shape at once."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from nerve.config import require
from nerve.optim.alike import alike
from nerve.optim.closure import evaluate_closure


class Dion(Optimizer):
    """Distributed orthonormalized updates, on one device.

    For a weight W of m outputs and n inputs, its gradient G, a momentum M (m × n, from 0) and a
    right factor V (n × r, kept from step to step, random at first), each step does

        B = M + G
        P = orth(B V)               m × r, orthonormal columns
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
        loss = evaluate_closure(closure)
        everything = chain.from_iterable(group["params"] for group in self.param_groups)
        indices = {weight: index for index, weight in enumerate(everything)}
        for group in self.param_groups:
            for weights in alike(group["params"]):
                self._update(weights, group, indices)
        return loss

    def _update(
        self, weights: list[Tensor], group: dict[str, Any], indices: Mapping[Tensor, int]
    ) -> None:
        """Updates weights of one shape."""
        states = [self._state_of(weight, group, indices[weight]) for weight in weights]
        momenta, rights = ([state[key] for state in states] for key in ("momentum", "right"))
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        torch._foreach_add_(momenta, gradients)
        buffers, old = torch.stack(momenta), torch.stack(rights)
        left, unscaled, right = power_step(buffers, old)
        torch._foreach_add_(momenta, list(left @ unscaled.mT), alpha=group["momentum"] - 1.0)
        torch._foreach_copy_(rights, list(torch.where(right.any(-2, keepdim=True), right, old)))
        updates = (left @ right.mT).to(weights[0].dtype)
        n_out, n_in = weights[0].shape
        torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(updates), alpha=-group["lr"] * math.sqrt(n_out / n_in))

    def _state_of(self, weight: Tensor, group: dict[str, Any], index: int) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            state["momentum"] = torch.zeros_like(weight, dtype=dtype)
            rank = max(1, round(group["rank_fraction"] * min(weight.shape)))
            state["right"] = _initial_right(weight.shape[1], rank, index).to(weight.device, dtype)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state in the stored precision; torch would cast it to the weights' dtype."""
        super().load_state_dict(dict(state_dict))
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, parameter in zip(indices, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][key] = value.to(parameter.device, copy=True)


def power_step(
    buffer: Float[Tensor, "*batch n_out n_in"], right: Float[Tensor, "*batch n_in rank"]
) -> tuple[
    Float[Tensor, "*batch n_out rank"],
    Float[Tensor, "*batch n_in rank"],
    Float[Tensor, "*batch n_in rank"],
]:
    """One step from the right factor V: P = orth(B V), R = Bᵀ P, and R with unit columns.

    P Rᵀ is B projected onto the columns of P. A column of R that is only rounding, compared with
    the longest one, is zero in the third matrix.
    """
    left = orthonormal(buffer @ right)
    unscaled = buffer.mT @ left
    lengths = torch.linalg.vector_norm(unscaled, dim=-2, keepdim=True)
    longest = lengths.amax(-1, keepdim=True)
    rounding = torch.finfo(buffer.dtype).eps * max(buffer.shape[-2:]) * longest
    unit = torch.where(lengths > rounding, unscaled / lengths, torch.zeros_like(unscaled))
    return left, unscaled, unit


def orthonormal(
    columns: Float[Tensor, "*batch n_out rank"],
) -> Float[Tensor, "*batch n_out rank"]:
    """Orthonormal columns with the same span: the Q of a QR decomposition whose R has a positive
    diagonal.

    Cholesky's R of the Gram matrix, in float64 and repeated, is batched on a GPU, where Householder
    reflections would take one matrix after the other. Columns that depend on others up to rounding
    are orthogonal to them, and of any length up to 1.

    Source: CholeskyQR3 of Fukaya et al. 2020, doi.org/10.1137/18M1218212, with columns of unit
    length and a shift of rounding.
    """
    q = columns.double()
    shift = 4 * q.shape[-1] * torch.finfo(q.dtype).eps
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    for _ in range(3):
        lengths = torch.linalg.vector_norm(q, dim=-2, keepdim=True)
        q = q / torch.where(lengths > 0, lengths, 1.0)
        lower = torch.linalg.cholesky_ex(q.mT @ q + shift * identity).L
        q = torch.linalg.solve_triangular(lower.mT, q, upper=True, left=False)
    return q.to(columns.dtype)


def _initial_right(n_in: int, rank: int, index: int) -> Float[Tensor, "n_in rank"]:
    """Standard normal numbers that depend only on the arguments; drawn on the CPU."""
    return torch.randn(n_in, rank, generator=torch.Generator().manual_seed(index))
