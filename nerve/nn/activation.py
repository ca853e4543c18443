"""The activation factor: the nonlinearity of the FFNs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nerve.config import require, require_choice


class ReLUSquared(nn.Module):
    """max(x, 0)² (So et al. 2021, Primer)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return F.relu(x).square()


class LearnableLeakyReLU(nn.Module):
    """x where x > 0, slope · x elsewhere, with a learnable slope.

    Args:
        slope: the parameter, shape [1]; several modules may share one.
    """

    def __init__(self, slope: nn.Parameter) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return F.prelu(x, self.slope)


class Interpolated(nn.Module):
    """α · base(x) + (1 - α) · x (ours): a nonlinearity of adjustable strength.

    α = 0 is the identity and α = 1 the base, bit for bit; with ReLU it is the leaky ReLU with slope
    1 - α.

    Args:
        base: the nonlinearity at full strength.
        alpha: in [0, 1].
    """

    def __init__(self, base: nn.Module, alpha: int | float) -> None:
        super().__init__()
        self.base = base
        self.alpha = alpha

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.lerp(x, self.base(x), self.alpha)


@dataclass(frozen=True)
class Activation:
    """The nonlinearity of every FFN.

    Attributes:
        name: a key of `ACTIVATIONS`.
        negative_slope: slope of the leaky activations, in [0, 1]; the initial value of the
            learnable one.
        shared: whether the learnable slope is one parameter for all layers, not one per layer.
        base: the interpolated activation at full strength, a key of `BASES`.
        alpha: strength of the interpolated activation, in [0, 1].

    Raises:
        ConfigError: for an unknown name, or an option that the activation does not have.
    """

    name: str = "gelu"
    negative_slope: float = 0.01
    shared: bool = False
    base: str = "gelu"
    alpha: int | float = 0.5

    def __post_init__(self) -> None:
        require_choice("activation.name", self.name, ACTIVATIONS)
        require(
            0 <= self.negative_slope <= 1,
            f"activation.negative_slope must lie in [0, 1]; got {self.negative_slope}.",
        )
        leaky = self.name in ("leaky_relu", "learnable_leaky_relu")
        require(
            leaky or self.negative_slope == Activation.negative_slope,
            f"activation.negative_slope={self.negative_slope} has no effect with "
            f"activation.name={self.name}. Use activation.name=leaky_relu.",
        )
        require(
            self.name == "learnable_leaky_relu" or not self.shared,
            f"activation.shared=true has no effect with activation.name={self.name}, which has "
            "no learnable slope. Use activation.name=learnable_leaky_relu.",
        )
        require_choice("activation.base", self.base, BASES)
        require(
            0 <= self.alpha <= 1,
            f"activation.alpha must lie in [0, 1]; got {self.alpha}.",
        )
        for key in ("base", "alpha"):
            value = getattr(self, key)
            require(
                self.name == "interpolated" or value == getattr(Activation, key),
                f"activation.{key}={value} has no effect with activation.name={self.name}. Use "
                "activation.name=interpolated.",
            )

    def build(self, n_layers: int) -> list[nn.Module]:
        """One module for each of `n_layers` layers, so that each can have its own hook."""
        return ACTIVATIONS[self.name](self, n_layers)


def _separate(make: Callable[[], nn.Module]) -> Callable[[Activation, int], list[nn.Module]]:
    return lambda _, n_layers: [make() for _ in range(n_layers)]


def _leaky_relu(activation: Activation, n_layers: int) -> list[nn.Module]:
    return [nn.LeakyReLU(activation.negative_slope) for _ in range(n_layers)]


def _learnable_leaky_relu(activation: Activation, n_layers: int) -> list[nn.Module]:
    def slopes(n: int) -> list[nn.Parameter]:
        return [nn.Parameter(torch.tensor([float(activation.negative_slope)])) for _ in range(n)]

    each = slopes(1) * n_layers if activation.shared else slopes(n_layers)
    return [LearnableLeakyReLU(slope) for slope in each]


def _interpolated(activation: Activation, n_layers: int) -> list[nn.Module]:
    bases = ACTIVATIONS[activation.base](Activation(activation.base), n_layers)
    return [Interpolated(base, activation.alpha) for base in bases]


BASES = ("gelu", "relu", "silu", "relu_squared")
"""The nonlinearities that `interpolated` can use: those without options."""

ACTIVATIONS: dict[str, Callable[[Activation, int], list[nn.Module]]] = {
    "gelu": _separate(nn.GELU),
    "relu": _separate(nn.ReLU),
    "leaky_relu": _leaky_relu,
    "learnable_leaky_relu": _learnable_leaky_relu,
    "silu": _separate(nn.SiLU),
    "relu_squared": _separate(ReLUSquared),
    "identity": _separate(nn.Identity),
    "interpolated": _interpolated,
}
