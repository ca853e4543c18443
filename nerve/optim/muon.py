"""Muon, updating all matrices of one shape at once."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nerve.optim.alike import alike
from nerve.optim.closure import evaluate_closure


class Muon(torch.optim.Muon):
    """torch's Muon, with its settings and state, but with batched products for all matrices of one
    shape and one kernel for each elementwise operation.

    One after the other, the 48 matrices of a 12-layer GPT would take some 1,500 kernels per step,
    whose launches take longer than the rest of the step. Each update equals torch's up to the order
    of summation in bfloat16 products.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs `closure` with gradients enabled, if given, and updates; returns its loss."""
        loss = evaluate_closure(closure)
        for group in self.param_groups:
            for weights in alike(group["params"]):
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Updates weights of one shape."""
        gradients, momenta = [], []
        for weight in weights:
            assert weight.grad is not None
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight.grad)
            gradients.append(weight.grad)
            momenta.append(state["momentum_buffer"])
        lr, momentum = float(group["lr"]), group["momentum"]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        directions = (
            torch._foreach_lerp(gradients, momenta, momentum) if group["nesterov"] else momenta
        )
        stacked = torch.stack([*directions]).bfloat16()
        settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
        updates = orthogonalized(stacked, *settings).to(weights[0].dtype).contiguous()
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        size = _size(group["adjust_lr_fn"], *weights[0].shape)
        torch._foreach_add_(weights, list(updates.unbind()), alpha=-lr * size)


def orthogonalized(
    matrices: Float[Tensor, "n d_out d_in"],
    coefficients: tuple[float, float, float],
    n_steps: int,
    eps: float,
) -> Float[Tensor, "n d_out d_in"]:
    """Matrices with the same singular vectors, and singular values of about 1 (.7 to 1.2 with
    torch's coefficients): X ← a X + (b XXᵀ + c (XXᵀ)²) X, starting from X with Frobenius norm 1, in
    the precision of the input.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(n_steps):
        gram = x @ x.mT
        x = _plus_product(a, x, 1.0, _plus_product(b, gram, c, gram, gram), x)
    return x.mT if is_tall else x


def _plus_product(
    beta: float,
    base: Float[Tensor, "n i j"],
    alpha: float,
    left: Float[Tensor, "n i k"],
    right: Float[Tensor, "n k j"],
) -> Float[Tensor, "n i j"]:
    """β base + α left · right, rounded once.

    On an H200 that processes share, the kernel with which cuBLAS of CUDA 13.0 adds and multiplies
    twelve bfloat16 matrices of 512 × 512 (nvjet, in clusters of eight blocks) now and then ends the
    process with an "unspecified launch failure". Its kernels that only multiply do not, so on a GPU
    the products are kept in float32 and added afterwards.
    """
    if not base.is_cuda or base.dtype != torch.bfloat16:
        return torch.baddbmm(base, left, right, beta=beta, alpha=alpha)
    product = torch.bmm(left, right, out_dtype=torch.float32)
    if alpha != 1.0:
        product.mul_(alpha)
    rounded = torch.empty_like(product, dtype=base.dtype)
    return torch.add(product, base, alpha=beta, out=rounded)


def _size(rule: str | None, d_out: int, d_in: int) -> float:
    """The factor on the learning rate of a matrix, by torch's rules."""
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(d_out, d_in))
    return math.sqrt(max(1.0, d_out / d_in))
