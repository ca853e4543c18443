"""Initial weights that depend on the seed and on the name of each matrix, and on nothing else; or,
where the size of the pre-activations is chosen, on a first batch as well."""

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

    Each matrix has a generator of its own, seeded by `seed` and the matrix's name: two models that
    share a layer begin with the same weights there, whatever the rest of them is. Norms and slopes
    keep the values that they were built with. A constrained weight is drawn, then projected.
    Parameters on the meta device are left alone.

    Args:
        seed: any integer.
        std: of the weights of `nn.Linear` and `nn.Embedding`.
        residual_outputs: the matrices that write into the residual stream.
        residual_scale: multiplies their `std`.
    """
    residual = {id(linear) for linear in residual_outputs}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        if next(module.parameters()).is_meta:  # to read a constrained weight is to make it
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
    """Raises `ConfigError` for a `model.init_std` or a `model.pre_std` that is no size, and for one
    of pre that a constraint undoes."""
    require(init_std > 0, f"model.init_std must be positive; got {init_std}.")
    if pre_std is None:
        return
    require(pre_std > 0, f"model.pre_std must be null or positive; got {pre_std}.")
    require(
        ffn.constraint == "none",
        f"model.pre_std={pre_std} scales weights whose size ffn.constraint={ffn.constraint} "
        "decides. Set model.pre_std=null or ffn.constraint=none.",
    )


class _AllScaled(Exception):
    """Ends the forward pass: what follows the last FFN, the head above all, is of no use."""


@torch.no_grad()
def scale_pre(model: nn.Module, inputs: Tensor, std: int | float) -> dict[str, float]:
    """Scales the weight before each nonlinearity so that its pre-activations u have the size `std`.

    The size is SD(u) = sqrt(tr C / d_ff), C the covariance of u over all samples of `inputs`. FFNs
    are scaled in the order in which they run, in one forward pass: each sees what those before it
    give with their scaled weights. Dropout is off meanwhile, and no random number is drawn.

    Args:
        model: with `FeedForward`s without constraint, as it was initialized, biases 0.
        inputs: a batch, as the model takes it.
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
