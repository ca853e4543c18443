"""Initial weights, which depend only on the seed and the name of each matrix; with `model.pre_std`,
also on the first batch."""

import hashlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nerve.config import require
from nerve.nn.constraint import assign
from nerve.nn.ffn import FeedForward, FFNDesign


@torch.no_grad()
def initialize(
    model: nn.Module,
    *,
    seed: int,
    std: float,
    residual_outputs: Collection[nn.Linear] = (),
    residual_scale: float = 1.0,
) -> None:
    """Draws every matrix and embedding from Normal(0, std²) and sets the biases to 0.

    Each matrix has its own generator, seeded with `seed` and the name of the matrix: two models
    that share a layer have the same initial weights there, even if the rest differs. Norms and
    slopes keep the values that they were built with. A constrained weight is drawn, then projected.
    Parameters on the meta device are left alone.

    Args:
        seed: any integer.
        std: standard deviation of the weights of `nn.Linear` and `nn.Embedding`.
        residual_outputs: the matrices that write into the residual stream.
        residual_scale: factor on their `std`.
    """
    residual = {id(linear) for linear in residual_outputs}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        if next(module.parameters()).is_meta:  # reading a constrained weight would compute it
            continue
        scale = residual_scale if id(module) in residual else 1.0
        drawn = torch.empty(module.weight.shape, device="cpu")
        drawn.normal_(0.0, std * scale, generator=_generator(seed, f"{name}.weight"))
        if isinstance(module, nn.Linear):
            assign(module, drawn)
            if module.bias is not None:
                module.bias.zero_()
        else:
            module.weight.copy_(drawn)


def check_initial(init_std: float, pre_std: int | float | None, ffn: FFNDesign) -> None:
    """Raises `ConfigError` for a `model.init_std` or `model.pre_std` that is not positive, and for
    a `model.pre_std` that a constraint would undo."""
    require(init_std > 0, f"model.init_std must be positive; got {init_std}.")
    if pre_std is None:
        return
    require(pre_std > 0, f"model.pre_std must be null or positive; got {pre_std}.")
    require(
        ffn.constraint == "none",
        f"model.pre_std={pre_std} scales weights whose size is determined by "
        f"ffn.constraint={ffn.constraint}. Set model.pre_std=null or ffn.constraint=none.",
    )


class _AllScaled(Exception):
    """Ends the forward pass after the last FFN, because the rest is not needed."""


@torch.no_grad()
def scale_pre(model: nn.Module, inputs: Tensor, std: int | float) -> dict[str, float]:
    """Scales the weight before each nonlinearity so that SD(u) of its pre-activations is `std`.

    SD(u) = sqrt(tr C / d_ff), where C is the covariance of u over all samples of `inputs`. FFNs are
    scaled in the order in which they run, in one forward pass: each sees the output of those before
    it with their scaled weights. Dropout is disabled, and no random numbers are drawn.

    Args:
        model: a freshly initialized model with unconstrained `FeedForward`s and zero biases.
        inputs: a batch of model inputs.
        std: above 0.

    Returns:
        The factor of each weight, by name and layer, such as `ffn/03`.

    Raises:
        ConfigError: for pre-activations that do not vary over the batch, or are not finite.
    """
    ffns = [module for module in model.modules() if isinstance(module, FeedForward)]
    factors: dict[str, float] = {}

    def scaling(ffn: FeedForward) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(linear: nn.Module, arguments: tuple[Any, ...]) -> None:
            features = F.linear(arguments[0], ffn.pre.weight).flatten(0, -2)
            size = float(features.double().var(dim=0).mean().sqrt())
            name = f"{ffn.name}/{ffn.layer:02d}"
            require(
                0 < size < float("inf"),
                f"model.pre_std={std} needs pre-activations that vary over the first batch; those "
                f"of {name} have a standard deviation of {size}. Check the data and the model.",
            )
            factors[name] = std / size
            ffn.pre.weight.mul_(factors[name])
            if len(factors) == len(ffns):
                raise _AllScaled

        return hook

    was_training = model.training
    handles = [ffn.pre.register_forward_pre_hook(scaling(ffn)) for ffn in ffns]
    try:
        model.eval()(inputs)
    except _AllScaled:
        pass
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return factors


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
