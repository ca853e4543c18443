"""Constraints on the geometry of the FFN's weights, as parametrizations of `torch.nn.utils`.

A constrained weight is a function of the parameters that the optimizer moves, so that every step of
any optimizer keeps the constraint. Assigning to `linear.weight` goes through the inverse.

- `weight_norm`: each row is g · v/||v||, its length a parameter apart from its direction (Salimans
  and Kingma 2016).
- `spectral_norm`: W/σ(W), the largest singular value is 1 (Miyato et al. 2018), as estimated by
  power iteration: each read in training mode iterates, one in evaluation mode does not. Those of a
  network iterate at once, before its forward pass (`iterate_together`), for the first read in it.
- `hyperspherical`: each row is v/||v||, on the unit sphere (Liu et al. 2017).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

Weight = Float[Tensor, "d_out d_in"]

# Largest σ among the weights that a GPT of d_model 128 used in its first 20 AdamW steps at lr 3e-3,
# and after them, by iterations (4 seeds): 1: 1.68, 1.16; 5: 1.22, 1.0015; 10: 1.12, 1.0003;
# 20: 1.03, 1.00001; 40: 1.02, 1.00000. The first steps turn the leading direction around.
N_POWER_ITERATIONS = 20


class UnitRows(nn.Module):
    """row / ||row||, its own inverse on the sphere."""

    def forward(self, weight: Weight) -> Weight:
        return F.normalize(weight, dim=1)

    def right_inverse(self, weight: Weight) -> Weight:
        return weight if weight.is_meta else F.normalize(weight, dim=1)


class WeightNorm(parametrizations._WeightNorm):
    """That of torch. On the meta device it computes no length."""

    def right_inverse(self, weight: Weight) -> tuple[Float[Tensor, "d_out 1"], Weight]:
        if weight.is_meta:
            return weight.new_empty((len(weight), 1)), weight
        lengths, directions = super().right_inverse(weight)
        return lengths, directions


class SpectralNorm(parametrizations._SpectralNorm):
    """That of torch, in the precision of the weight also under autocast, where 16 bits would put σ
    off by up to 0.4%. On the meta device, where there are no values, it draws and iterates nothing.

    Attributes:
        is_ahead: whether the iterations of the next read are done.
    """

    is_ahead = False

    def __init__(self, weight: Weight, n_power_iterations: int) -> None:
        if not weight.is_meta:
            super().__init__(weight, n_power_iterations)
            return
        # As torch has it; its singular vectors are drawn and refined by way of a dozen operators
        # written in Python, a thousand times the cost of what they leave here: two shapes.
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
        with torch.autocast(weight.device.type, enabled=False):
            normalized: Tensor = super().forward(weight)
        return normalized


class PowerIterations:
    """A hook before the forward pass of a network in training: the iterations of all of its
    spectral norms that the pass will read, one batch of products for the matrices of one shape.

    One by one, 20 iterations of 24 matrices are 960 products of a matrix and a vector, which take a
    GPU longer to launch than the rest of a step.
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
            # Of a shard there is no matrix here: it is whole when it is read.
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
    """`n` times u = W v / ||W v||, v = Wᵀ u / ||Wᵀ u|| of each matrix, from the `right` v; gives
    the last u and v, which estimate its leading singular vectors. Lengths below `eps` count as it.
    """
    for _ in range(n):
        left = F.normalize((weights @ right[..., None])[..., 0], dim=-1, eps=eps)
        right = F.normalize((weights.mT @ left[..., None])[..., 0], dim=-1, eps=eps)
    return left, right


def iterate_together(model: nn.Module) -> None:
    """Has the spectral norms of a network, where it has any, iterate at once from now on."""
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
    """Checks its shapes by making the weight once, but on the meta device: nothing is run there."""
    unsafe = linear.weight.is_meta
    parametrize.register_parametrization(linear, "weight", parametrization, unsafe=unsafe)


CONSTRAINTS: dict[str, Callable[[nn.Linear], object]] = {
    "none": _none,
    "weight_norm": _weight_norm,
    "spectral_norm": _spectral_norm,
    "hyperspherical": _hyperspherical,
}


def constrain(linear: nn.Linear, constraint: str) -> nn.Linear:
    """`linear` itself, its weight from now on held to `constraint`, a key of `CONSTRAINTS`."""
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
    """By way of the smaller Gram matrix, several times faster than a full decomposition."""
    if weight.shape[0] < weight.shape[1]:
        right, left = _leading_singular_vectors(weight.T)
        return left, right
    tall = weight.double()
    right = torch.linalg.eigh(tall.T @ tall).eigenvectors[:, -1]
    return F.normalize(tall @ right, dim=0), right
