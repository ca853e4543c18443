"""Initial weights that depend on the seed and on the name of each matrix, and on nothing else."""

import hashlib
from collections.abc import Collection

import torch
from torch import nn

from nerve.nn.constraint import assign


@torch.no_grad()
def initialise(
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
        if not isinstance(module, nn.Linear | nn.Embedding) or module.weight.is_meta:
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


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
