"""The activation factor against formulas in float64, and the learnable slope."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import erf, expit
from torch import nn

from nerve.errors import ConfigError
from nerve.nn.activation import ACTIVATIONS, BASES, Activation

FORMULAS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "learnable_leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "silu": lambda x: x * expit(x),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "identity": lambda x: x,
    "interpolated": lambda x: (x * (1 + erf(x / np.sqrt(2))) / 2 + x) / 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_follows_its_formula(name: str) -> None:
    x = torch.linspace(-5, 5, 101)
    (act,) = Activation(name).build(1)
    np.testing.assert_allclose(
        act(x).detach().numpy(), FORMULAS[name](x.double().numpy()), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["leaky_relu", "learnable_leaky_relu"])
def test_the_negative_slope_is_taken_from_the_values(name: str) -> None:
    (act,) = Activation(name, negative_slope=0.25).build(1)
    assert act(torch.tensor([-2.0, 2.0])).tolist() == [-0.5, 2.0]


def test_the_gradient_of_the_slope_is_the_sum_of_the_negative_inputs() -> None:
    (act,) = Activation("learnable_leaky_relu").build(1)
    x = torch.tensor([[-3.0, 1.0], [-0.5, 2.0]])
    act(x).sum().backward()
    assert act.slope.grad.tolist() == [-3.5]


def test_every_layer_has_a_module_and_a_slope_of_its_own() -> None:
    layers = nn.ModuleList(Activation("learnable_leaky_relu").build(3))
    assert len(set(layers)) == 3
    assert [name for name, _ in layers.named_parameters()] == ["0.slope", "1.slope", "2.slope"]


def test_a_shared_slope_is_one_parameter_in_modules_of_their_own() -> None:
    layers = nn.ModuleList(Activation("learnable_leaky_relu", shared=True).build(3))
    assert len(set(layers)) == 3
    assert [name for name, _ in layers.named_parameters()] == ["0.slope"]
    for layer in layers:
        layer(torch.tensor([-1.0])).sum().backward()
    assert layers[0].slope.grad.tolist() == [-3.0]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("alpha", [0, 0.25, 1])
def test_an_interpolation_lies_between_the_identity_and_its_base(base: str, alpha: float) -> None:
    """Bit for bit at both ends, so these runs equal those of the identity and the base."""
    x = torch.linspace(-5, 5, 101)
    (act,) = Activation("interpolated", base=base, alpha=alpha).build(1)
    (whole,) = Activation(base).build(1)
    if alpha in (0, 1):
        assert torch.equal(act(x), whole(x) if alpha else x)
    wide = x.double().numpy()
    expected = alpha * FORMULAS[base](wide) + (1 - alpha) * wide
    np.testing.assert_allclose(act(x).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_an_interpolated_relu_is_the_leaky_relu_of_the_rest_as_its_slope() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    for alpha in (0.1, 0.5, 0.75):
        (act,) = Activation("interpolated", base="relu", alpha=alpha).build(1)
        (leaky,) = Activation("leaky_relu", negative_slope=1 - alpha).build(1)
        torch.testing.assert_close(act(x), leaky(x), rtol=1e-14, atol=1e-15)
        slopes = [torch.autograd.grad(f(x[x != 0]).sum(), x)[0] for f in (act, leaky)]
        torch.testing.assert_close(*slopes, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "interpolated", "base": "identity"}, r"activation\.base must be one of gelu"),
        (
            {"name": "interpolated", "alpha": 1.5},
            r"activation\.alpha must lie in \[0, 1\]; got 1.5",
        ),
        ({"name": "relu", "alpha": 1}, r"activation\.alpha=1 has no effect .*name=relu"),
        ({"base": "relu"}, r"activation\.base=relu has no effect with activation\.name=gelu"),
        ({"name": "gleu"}, r"activation\.name must be one of .*Did you mean 'gelu'"),
        ({"name": "relu", "shared": True}, r"activation\.shared=true .*activation\.name=relu"),
        (
            {"name": "gelu", "negative_slope": 0.2},
            r"activation\.negative_slope=0\.2 .*activation\.name=gelu",
        ),
        (
            {"name": "leaky_relu", "negative_slope": -0.1},
            r"activation\.negative_slope must lie in \[0, 1\]",
        ),
    ],
)
def test_bad_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Activation(**values)
