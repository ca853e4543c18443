"""Adafactor, updating all parameters of one shape at once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nerve.optim.alike import alike
from nerve.optim.closure import evaluate_closure


class Adafactor(torch.optim.Adafactor):
    """torch's Adafactor, with its settings and state, but with one kernel for each operation on all
    parameters of one shape, and without waiting for the device.

    torch's copies the norms of each parameter and of its update to the host, twice per parameter
    and step, whether or not `foreach` is set. Here they stay on the device. Each update equals
    torch's up to rounding; the estimate of the second moments is a product of float32 numbers even
    where matrix products may use TF32.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs `closure` with gradients enabled, if given, and updates; returns its loss."""
        loss = evaluate_closure(closure)
        for group in self.param_groups:
            for weights in alike(group["params"], self._next_step):
                self._update(weights, group, float(self.state[weights[0]]["step"]))
        return loss

    def _next_step(self, weight: Tensor) -> float:
        """Counts a step of a parameter, and returns how many it has made."""
        assert weight.grad is not None
        for what, unsupported in (
            ("complex parameters", weight.is_complex()),
            ("sparse gradients", weight.grad.is_sparse),
        ):
            if unsupported:
                raise RuntimeError(f"Adafactor does not support {what}")
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            if weight.ndim > 1:
                state["row_var"] = torch.zeros_like(weight.grad[..., :1])
                state["col_var"] = torch.zeros_like(weight.grad[..., :1, :])
            else:
                state["variance"] = torch.zeros_like(weight.grad)
        state["step"] += 1
        return float(state["step"])

    def _update(self, weights: list[Tensor], group: dict[str, Any], step: float) -> None:
        """Updates weights of one shape that have all made `step` steps."""
        lr, (eps1, eps2) = float(group["lr"]), group["eps"]
        eps1 = torch.finfo(weights[0].dtype).eps if eps1 is None else eps1
        root = weights[0].numel() ** 0.5
        alphas = _at_least(eps2, _norms(weights) / root) * min(lr, step**-0.5)
        if group["weight_decay"] != 0:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        gradients = torch.stack([each.grad for each in weights if each.grad is not None])
        if group["maximize"]:
            gradients.neg_()
        updates = self._second_moments(weights, gradients, step ** group["beta2_decay"], eps1)
        updates.clamp_(min=eps1 * eps1).rsqrt_().mul_(gradients)
        alphas /= _at_least(1.0, _norms(updates.unbind()) / (root * group["d"]))
        updates.mul_(alphas.view(-1, *[1] * weights[0].ndim))
        torch._foreach_sub_(weights, list(updates.unbind()))

    def _second_moments(
        self, weights: list[Tensor], gradients: Tensor, newest: float, eps1: float
    ) -> Tensor:
        """Estimates [n, *shape] of the squared gradients, in which the newest ones have the weight
        `newest`."""

        def averaged(name: str, squares: Tensor) -> Tensor:
            averages = [self.state[weight][name] for weight in weights]
            torch._foreach_lerp_(averages, list(squares.unbind()), newest)
            return torch.stack(averages)

        if weights[0].ndim < 2:
            return averaged("variance", gradients.square())
        means = [
            torch.linalg.vector_norm(gradients, dim=dim, keepdim=True)
            .square_()
            .div_(gradients.shape[dim])
            for dim in (-1, -2)
        ]
        rows, columns = averaged("row_var", means[0]), averaged("col_var", means[1])
        return rows / rows.mean(dim=-2, keepdim=True).clamp_(min=eps1) * columns


def _norms(tensors: Sequence[Tensor]) -> Float[Tensor, " n"]:
    """The norm of each tensor, on their device; at least in float32, because products of norms and
    learning rates may need more digits, or be smaller, than 16 bits can represent."""
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    return norms.to(torch.promote_types(norms.dtype, torch.float32))


def _at_least(least: float, numbers: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The larger of both; `least` for NaN, so that NaN spreads no further than in torch's
    Adafactor."""
    return torch.where(numbers > least, numbers, least)
