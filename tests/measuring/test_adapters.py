"""Adapters around linear layers: pre is the input of the nonlinearity, including what they add."""

import pytest
import torch
from by_hand import Plain, assert_measured
from torch import Tensor, nn
from torch.nn import functional

import nerve
from nerve.errors import MeasurementError
from nerve.measuring.find import find_ffns

D, FF, R = 6, 10, 2


class Beside(nn.Module):
    """Two narrow linear layers beside the wrapped one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, R, bias=False)
        self.b = nn.Linear(R, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Declared(Beside):
    """As PEFT does it: it has the attributes of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.in_features, self.out_features = base.in_features, base.out_features


class Bare(nn.Module):
    """Parameters beside the wrapped layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(base.in_features, R))
        self.b = nn.Parameter(torch.randn(R, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


class Own(nn.Module):
    """A weight of its own, two narrow linear layers, and others for a second task."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight
        self.a = nn.ModuleDict({t: nn.Linear(base.in_features, R) for t in "st"})
        self.b = nn.ModuleDict({t: nn.Linear(R, base.out_features) for t in "st"})

    def forward(self, x: Tensor) -> Tensor:
        added = [self.b[task](self.a[task](x)) for task in "st"]
        return functional.linear(x, self.weight) + sum(added)


KINDS = [Beside, Declared, Bare, Own]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_square", [False, True])
def test_a_wrapped_projection_is_measured_with_its_wrapper(kind, is_square):
    width = D if is_square else FF
    model = Plain(kind(nn.Linear(D, width)), kind(nn.Linear(width, D))).double().train()
    x = torch.randn(3, 30, D, dtype=torch.float64)
    (row,) = nerve.measure(model, [x]).to_dict("records")
    assert_measured(row, model.up(x), model.up(x).relu())
    assert row["d_in"] == D
    assert model.training


class Gated(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.one, self.two = kind(nn.Linear(D, FF)), kind(nn.Linear(D, FF))
        self.down = kind(nn.Linear(FF, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.one(x)) * self.two(x))


@pytest.mark.parametrize("kind", KINDS)
def test_wrapped_projections_of_a_gated_ffn_are_measured_with_their_wrappers(kind):
    model = Gated(kind).double()
    x = torch.randn(4, 20, D, dtype=torch.float64)
    (ffn,) = find_ffns(model, x)
    assert (ffn.pre, ffn.post, ffn.gated) == (model.one, model.down, True)
    (row,) = nerve.measure(model, [x]).to_dict("records")
    gate = model.one(x)
    assert_measured(row, gate, functional.silu(gate) * model.two(x))


class Within(nn.Module):
    """The FFN itself adds what its adapters give, so that no module has pre as its output."""

    def __init__(self, is_gated: bool) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, FF), nn.Linear(FF, D), nn.GELU()
        self.a, self.b = nn.Linear(D, R), nn.Linear(R, FF)
        self.gate = Beside(nn.Linear(D, FF)) if is_gated else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x) + self.b(self.a(x)))
        return self.down(h if self.gate is None else h * self.gate(x))


@pytest.mark.parametrize(
    ("is_gated", "why"), [(False, "on two projections alike"), (True, "on 3 projections")]
)
def test_a_sum_of_projections_is_not_mistaken_for_one_of_them(is_gated, why):
    """Pre is then described as the input of the activation."""
    model = Within(is_gated).double()
    x = torch.randn(3, 30, D, dtype=torch.float64)
    with pytest.raises(MeasurementError, match=f"depends {why}.*Site\\(activation, .input.\\)"):
        find_ffns(model, x)
    ffn = nerve.FFNAdapter(0, "ffn", nerve.Site(model.act, "input"), model.down)
    (row,) = nerve.measure(model, [x], ffns=[ffn]).to_dict("records")
    pre = model.up(x) + model.b(model.a(x))
    post = model.act(pre) if model.gate is None else model.act(pre) * model.gate(x)
    assert_measured(row, pre, post)


class SmallFFN(Beside):
    """A small FFN beside a linear layer, whose weights have the shapes of an adapter's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x).relu())


def test_a_small_ffn_beside_a_linear_layer_is_found():
    model = SmallFFN(nn.Linear(D, D))
    (ffn,) = find_ffns(model, torch.randn(3, 30, D))
    assert (ffn.pre, ffn.post) == (model.a, model.b)
