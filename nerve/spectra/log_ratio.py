"""log PR of features as a term of a loss: its value and its gradient, without eigenvalues."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def log_participation_ratio(
    features: Float[Tensor, "*samples dim"], n_samples: int
) -> Float[Tensor, ""]:
    """log PR = log(tr(C)² / ||C||²_F) of some samples of `features`, with its gradient.

    C is the covariance. The matrices YᵀY and YYᵀ of the centered samples have the same nonzero
    eigenvalues, so the smaller one is used. It costs two products, one for the value and one for
    the gradient: in bfloat16 with sums in float32 for 16-bit features, otherwise in their own
    dtype, regardless of autocast.

    The value is in [0, log dim] and does not depend on the scale of the features. Only the samples
    that are used have a gradient; that of the others is 0. If the spectrum is flat or has one
    direction, PR is at an extreme and the gradient is 0 up to rounding. Without variance (a dead
    layer, a single sample), value and gradient are 0.

    Args:
        features: floats; the last dimension holds the features of a sample.
        n_samples: number of samples to use, spread evenly over all of them and over the positions
            in a sequence; all if there are fewer.
    """
    value, *_ = _log_ratio(features, n_samples)
    return value


def evenly(n: int, n_taken: int, device: torch.device | None = None) -> Int64[Tensor, " n_taken"]:
    """`n_taken` different numbers below `n`, or all of them: the multiples of a step modulo `n`.

    Any run of consecutive ones is spread evenly over all samples and, in sequences whose length
    divides `n`, over the positions. The step is the number nearest to `n` times the golden ratio
    that has no factor in common with `n`.
    """
    golden = round(n * (5**0.5 - 1) / 2)
    steps = (golden + sign * offset for offset in range(n) for sign in (1, -1))
    step = next(step for step in steps if math.gcd(step, n) == 1)
    return torch.arange(min(n, n_taken), device=device) * step % n


_MEAN_ROUNDING = 32
"""The largest error of a mean, in units of rounding. A feature that varies by less is constant:
dividing by its range would create a spectrum of rounding errors."""


# An operator, so that the compiler leaves it as it is. Passes over the samples cost as much as the
# products, so there are few of them, and no copy in float32.
@torch.library.custom_op("nerve::log_ratio", mutates_args=())
def _log_ratio(features: Tensor, n_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log PR; its gradient with respect to the samples that are used, as a direction and a factor;
    and the indices of these samples."""
    rows = features.detach().flatten(0, -2)
    # Computed on the device, because a CUDA graph must not copy from the host.
    taken = evenly(len(rows), n_samples, rows.device)
    narrow, wide = _types(rows)
    x = rows[taken]
    low, high = (end.to(wide) for end in torch.aminmax(x, dim=0))
    noise = _MEAN_ROUNDING * torch.finfo(wide).eps * torch.maximum(-low, high)
    size = (high - low).amax()
    varies = high - low > noise
    # Divided by their range, samples are neither too small nor too large to be squared.
    scale = torch.where(varies, 1 / size, 0.0)
    y = torch.empty_like(x, dtype=narrow)
    torch.addcmul(-scale * x.mean(dim=0, dtype=wide), x, scale, out=y)
    with torch.autocast(rows.device.type, enabled=False):
        if len(y) < y.shape[1]:
            matrix = y @ y.T
            product = matrix @ y
        else:
            matrix = y.T @ y
            product = y @ matrix
    trace, norm = (torch.linalg.vector_norm(each, dtype=wide).square() for each in (y, matrix))
    alive = varies.any()
    value = torch.where(alive, 2 * trace.log() - norm.log(), 0.0)
    direction = torch.addcmul(y, product, torch.where(alive, -trace / norm, 0.0))
    factor = torch.where(alive, 4 / (trace * size), 0.0)
    return value, direction, factor, taken


def _types(features: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of products, and of everything else."""
    narrow = torch.bfloat16 if features.dtype.itemsize == 2 else features.dtype
    return narrow, torch.promote_types(features.dtype, torch.float32)


@_log_ratio.register_fake
def _(features: Tensor, n_samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    narrow, wide = _types(features)
    dim = features.shape[-1]
    n = min(features.numel() // dim, n_samples)
    return (
        features.new_empty((), dtype=wide),
        features.new_empty((n, dim), dtype=narrow),
        features.new_empty((), dtype=wide),
        features.new_empty((n,), dtype=torch.int64),
    )


def _keep(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, ...]) -> None:
    _, direction, factor, taken = output
    ctx.save_for_backward(direction, factor, taken)
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


def _backward(ctx: Any, of_value: Tensor, *_: Any) -> tuple[Tensor, None]:
    direction, factor, taken = ctx.saved_tensors
    rows = (direction * (factor * of_value)).to(ctx.dtype)
    whole = rows.new_zeros((ctx.shape[:-1].numel(), ctx.shape[-1]))
    return whole.index_copy_(0, taken, rows).view(ctx.shape), None


_log_ratio.register_autograd(_backward, setup_context=_keep)
