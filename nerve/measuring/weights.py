"""The weight before a nonlinearity: whether it can be read and reproduces the layer's output."""

import sys

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from nerve.measuring.ffns import Site, is_pointwise, sample_of
from nerve.measuring.slices import Slice
from nerve.measuring.tap import Hook
from nerve.spectra.host_copy import Flag


def affine_of(site: Site, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """W and b of outputs = W x + b if the outputs are wider than x; None if no weight defines them.

    The module's own forward or a hook may change them (an adapter, an ablation); a parametrized
    weight in training differs at each access (spectral norm iterates).

    Args:
        site: the site of pre; the outputs may be a part of the module's output.
        inputs: the input of the module, `[*samples, d_in]`.
        outputs: pre, `[*samples, d_ff]`.
    """
    module = site.module
    if (
        site.of != "output"
        or not _is_affine(module)
        or "forward" in vars(module)
        or not all(isinstance(hook, Hook) for hook in module._forward_hooks.values())
        or (module.training and is_parametrized(module))
    ):
        return None
    weight, bias = module.weight, getattr(module, "bias", None)
    if type(weight) not in (Tensor, nn.Parameter) or outputs.shape[-1] <= inputs.shape[-1]:
        return None
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    matrix = weight.detach()
    matrix = matrix.T if _is_conv1d(module) else matrix.flatten(1) if matrix.ndim > 2 else matrix
    matrix = matrix[site.part]
    if matrix.shape != (outputs.shape[-1], inputs.shape[-1]):
        return None  # not the weights of these features, for example a shard
    return matrix, None if bias is None else bias.detach()[site.part]


def _is_affine(module: nn.Module) -> bool:
    """Whether its forward is that of a linear layer, of a slice of a parameter, of the Conv1D of
    transformers or of a convolution that is a matrix."""
    forward = type(module).forward
    if is_pointwise(module):
        return forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return forward in (nn.Linear.forward, Slice.forward) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    known = sys.modules.get("transformers.pytorch_utils")
    return known is not None and type(module).forward is known.Conv1D.forward


_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-3}
"""The largest error of W x + b in a forward pass, relative to the sum of the magnitudes of its
terms: TF32 rounds the factors of float32 to 11 digits. For 16-bit types it is 2**-6."""
_ROUNDING_OF_ALL = 2**-5
"""The largest root mean square error, relative to that of the outputs. The sum of magnitudes is
about sqrt(d_in) times as large as the outputs, so `_ROUNDING` alone would miss small changes."""
_CANCELLATION = 2**-16
"""The same relative to the sums of magnitudes, for outputs whose terms nearly cancel."""


def gives(weight: Tensor, bias: Tensor | None, inputs: Tensor, outputs: Tensor) -> Flag:
    """Whether a sample of the outputs equals W x + b up to rounding; does not wait for the device
    until the result is used.

    Args:
        weight, bias: W `[d_ff, d_in]`, and b `[d_ff]` or None.
        inputs: x, `[*samples, d_in]`.
        outputs: what is compared, `[*samples, d_ff]`.
    """
    if not outputs.numel():
        return Flag(torch.tensor(True))
    kind = torch.finfo(outputs.dtype)
    step = kind.tiny * kind.eps  # smaller values may have become 0
    x, y = (sample_of(each).detach().to(outputs.dtype).double() for each in (inputs, outputs))
    w, b = weight.double(), x.new_zeros(len(weight)) if bias is None else bias.double()
    off = y - torch.addmm(b, x, w.T)
    size = torch.addmm(b.abs(), x.abs(), w.abs().T)
    known = y.abs() < torch.inf
    off, size, y = torch.stack([off, size, y]).where(known, 0)
    beyond = torch.sub(off.abs(), size, alpha=_ROUNDING.get(outputs.dtype, 2**-6)).amax()
    norms = [torch.linalg.vector_norm(each) for each in (off, size, y)]
    n = y.numel()

    def holds(numbers: Tensor) -> bool:
        beyond, off, size, y = numbers.tolist()
        in_all = _ROUNDING_OF_ALL * y + _CANCELLATION * size + step * n**0.5
        return beyond <= step and off <= in_all

    return Flag(torch.stack([beyond, *norms]), holds)


def is_unrounded(inputs: Tensor, outputs: Tensor) -> bool:
    """Whether W x + b was not rounded to 16 bits, which the shortcut would leave out."""
    return inputs.dtype == outputs.dtype and outputs.dtype in (torch.float32, torch.float64)
