"""Constraints on the geometry of the FFN's weights, as parametrizations of `torch.nn.utils`.

A constrained weight is a function of the parameters that the optimizer updates, so every step of
any optimizer preserves the constraint. Assigning to `linear.weight` applies the inverse.

- `weight_norm`: each row is g · v/||v||, with separate parameters for its length and its direction
  (Salimans and Kingma 2016).
- `spectral_norm`: W/σ(W), whose largest singular value is 1 (Miyato et al. 2018), estimated by
  power iteration, which a read in training mode continues and a read in evaluation mode does not.
  For the first read in a forward pass, the weights of a network are iterated together before the
  pass (`iterate_together`).
- `hyperspherical`: each row is v/||v||, on the unit sphere (Liu et al. 2017).
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

Weight = Float[Tensor, "d_out d_in"]

# Largest σ of the weights of a GPT with d_model 128 in its first 20 AdamW steps at lr 3e-3, and
# after them, by number of iterations (4 seeds): 1: 1.68, 1.16; 5: 1.22, 1.0015; 10: 1.12, 1.0003;
# 20: 1.03, 1.00001; 40: 1.02, 1.00000. In the first steps the leading direction changes quickly.
N_POWER_ITERATIONS = 20


class UnitRows(nn.Module):
    """row / ||row||, which is its own inverse on the sphere."""

    def forward(self, weight: Weight) -> Weight:
        return F.normalize(weight, dim=1)

    def right_inverse(self, weight: Weight) -> Weight:
        return weight if weight.is_meta else F.normalize(weight, dim=1)


class WeightNorm(parametrizations._WeightNorm):
    """torch's weight normalization; on the meta device, it does not compute the lengths."""

    def right_inverse(self, weight: Weight) -> tuple[Float[Tensor, "d_out 1"], Weight]:
        if weight.is_meta:
            return weight.new_empty((len(weight), 1)), weight
        lengths, directions = super().right_inverse(weight)
        return lengths, directions


class SpectralNorm(parametrizations._SpectralNorm):
    """torch's spectral normalization, in the precision of the weight even under autocast, because
    16 bits would change σ by up to 0.4%. On the meta device, it neither draws nor iterates.

    Attributes:
        is_ahead: whether the iterations of the next read have already been done.
    """

    is_ahead = False

    def __init__(self, weight: Weight, n_power_iterations: int) -> None:
        if not weight.is_meta:
            super().__init__(weight, n_power_iterations)
            return
        # As in torch, but without drawing and refining the singular vectors: only their shapes
        # matter here, and on the meta device that would take a thousand times longer.
        nn.Module.__init__(self)
        self.dim, self.eps, self.n_power_iterations = 0, 1e-12, n_power_iterations
        for name, size in zip(("_u", "_v"), weight.shape, strict=True):
            self.register_buffer(name, weight.new_empty(size))

    def _power_method(self, weight_mat: Weight, n_power_iterations: int) -> None:
        if self.is_ahead:
            self.is_ahead = False
        elif not weight_mat.is_meta:
            super()._power_method(weight_mat, n_power_iterations)

    def forward(self, weight: Weight) -> Weight:
        # The meta device has no autocast to disable.
        autocast = (
            nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False)
        )
        with autocast:
            normalized: Tensor = super().forward(weight)
        return normalized


class PowerIterations:
    """A hook before the forward pass of a network in training: it does the iterations of all
    spectral norms for the pass, with batched products for the matrices of one shape.

    One by one, 20 iterations of 24 matrices would be 960 matrix-vector products, whose launches
    take longer than the rest of a step on a GPU.
    """

    def __init__(self, weights: list[parametrize.ParametrizationList]) -> None:
        self._weights = weights

    @torch.no_grad()
    def __call__(self, model: nn.Module, arguments: tuple[object, ...]) -> None:
        by_shape: dict[torch.Size, list[tuple[SpectralNorm, Tensor]]] = {}
        for each in self._weights:
            norm, weight = each[0], each.original
            assert isinstance(norm, SpectralNorm)
            assert isinstance(weight, Tensor)
            # A sharded weight is not available here; it is only gathered when it is read.
            is_whole = weight.shape == (len(norm._u), len(norm._v))
            if norm.training and is_whole and not weight.is_meta:
                by_shape.setdefault(weight.shape, []).append((norm, weight))
        for members in by_shape.values():
            norms = [norm for norm, _ in members]
            with torch.autocast(norms[0]._v.device.type, enabled=False):
                left, right = power_iteration(
                    torch.stack([weight for _, weight in members]),
                    torch.stack([norm._v for norm in norms]),
                    N_POWER_ITERATIONS,
                    norms[0].eps,
                )
            for norm, u, v in zip(norms, left, right, strict=True):
                norm._u.copy_(u)
                norm._v.copy_(v)
                norm.is_ahead = True


def power_iteration(
    weights: Float[Tensor, "n d_out d_in"], right: Float[Tensor, "n d_in"], n: int, eps: float
) -> tuple[Float[Tensor, "n d_out"], Float[Tensor, "n d_in"]]:
    """Iterates u = W v / ||W v||, v = Wᵀ u / ||Wᵀ u|| `n` times for each matrix, starting with
    v = `right`; returns the last u and v, which estimate the leading singular vectors. Lengths
    below `eps` are replaced by `eps`.
    """
    for _ in range(n):
        left = F.normalize((weights @ right[..., None])[..., 0], dim=-1, eps=eps)
        right = F.normalize((weights.mT @ left[..., None])[..., 0], dim=-1, eps=eps)
    return left, right


def iterate_together(model: nn.Module) -> None:
    """Makes the spectral norms of a network, if it has any, iterate together from now on."""
    weights = [
        each
        for each in model.modules()
        if isinstance(each, parametrize.ParametrizationList) and isinstance(each[0], SpectralNorm)
    ]
    if weights:
        model.register_forward_pre_hook(PowerIterations(weights))


def _none(linear: nn.Linear) -> None:
    return


def _weight_norm(linear: nn.Linear) -> None:
    _register(linear, WeightNorm(dim=0))


def _spectral_norm(linear: nn.Linear) -> None:
    _register(linear, SpectralNorm(linear.weight, N_POWER_ITERATIONS))


def _hyperspherical(linear: nn.Linear) -> None:
    _register(linear, UnitRows())


def _register(linear: nn.Linear, parametrization: nn.Module) -> None:
    """Registers a parametrization; torch's check, which computes the weight once, is skipped on the
    meta device."""
    unsafe = linear.weight.is_meta
    parametrize.register_parametrization(linear, "weight", parametrization, unsafe=unsafe)


CONSTRAINTS: dict[str, Callable[[nn.Linear], object]] = {
    "none": _none,
    "weight_norm": _weight_norm,
    "spectral_norm": _spectral_norm,
    "hyperspherical": _hyperspherical,
}


def constrain(linear: nn.Linear, constraint: str) -> nn.Linear:
    """Applies `constraint`, a key of `CONSTRAINTS`, to the weight of `linear`; returns `linear`."""
    CONSTRAINTS[constraint](linear)
    return linear


@torch.no_grad()
def assign(linear: nn.Linear, weight: Weight) -> None:
    """Sets the weight of `linear`, constrained or not, to the projection of `weight`.

    The power iteration of a spectral norm starts from the leading singular vectors of `weight`
    (float64), so the constraint holds from the first forward pass on.
    """
    if not parametrize.is_parametrized(linear, "weight"):
        linear.weight.copy_(weight)
        return
    linear.weight = weight
    buffers = dict(linear.named_buffers())
    if "parametrizations.weight.0._u" in buffers:
        left, right = _leading_singular_vectors(weight)
        buffers["parametrizations.weight.0._u"].copy_(left)
        buffers["parametrizations.weight.0._v"].copy_(right)


def _leading_singular_vectors(
    weight: Weight,
) -> tuple[Float[Tensor, " d_out"], Float[Tensor, " d_in"]]:
    """Computed from the smaller Gram matrix, several times faster than a full decomposition."""
    if weight.shape[0] < weight.shape[1]:
        right, left = _leading_singular_vectors(weight.T)
        return left, right
    tall = weight.double()
    right = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -1]
    return F.normalize(tall @ right, dim=0), right
