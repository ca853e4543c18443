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


class Scaled(nn.Module):
    """A factor for each output."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.rand(base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.scale


KINDS = [Beside, Declared, Bare, Own, Scaled]


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


class Activated(Scaled):
    """A projection and its nonlinearity, with a parameter for each feature, in one module."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.prelu(self.base(x).flatten(0, -2), self.scale).reshape(*x.shape[:-1], -1)


def test_a_projection_within_the_module_of_its_nonlinearity_is_found():
    first, second = Activated(nn.Linear(D, FF)), nn.Linear(FF, D)
    (ffn,) = find_ffns(nn.Sequential(first, second), torch.randn(3, 30, D))
    assert (ffn.pre, ffn.post) == (first.base, second)


class SmallFFN(Beside):
    """A small FFN beside a linear layer, whose weights have the shapes of an adapter's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x).relu())


class Within3D(SmallFFN):
    """It only accepts `[sequences, positions, features]`."""

    def forward(self, x: Tensor) -> Tensor:
        n_sequences, n_positions, width = x.shape
        return super().forward(x.view(n_sequences * n_positions, width)).view_as(x)


class Predictor(nn.Module):
    """A network of tokens, whose embedding and layers have the shapes of an adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, D)
        self.a, self.b = nn.Linear(D, R), nn.Linear(R, 30)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(self.a(self.embedding(ids)).relu())


@pytest.mark.parametrize("takes_tokens", [False, True])
def test_a_network_that_does_not_take_samples_of_features_hides_no_ffn(takes_tokens):
    torch.manual_seed(0)
    model = Predictor() if takes_tokens else Within3D(nn.Linear(D, D))
    x = torch.randint(30, (3, 20)) if takes_tokens else torch.randn(3, 30, D)
    (ffn,) = find_ffns(model, x)
    assert (ffn.pre, ffn.post) == (model.a, model.b)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_ffn_beside_a_linear_layer_is_found(dtype):
    model = SmallFFN(nn.Linear(D, D)).to(dtype)
    (ffn,) = find_ffns(model, torch.randn(3, 30, D, dtype=dtype))
    assert (ffn.pre, ffn.post) == (model.a, model.b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_many_features_are_affine_in_any_precision(kind, dtype):
    layers = nn.Linear(512, 768), nn.Linear(768, 512)
    model = Plain(*(kind(layer).to(dtype) for layer in layers))
    (ffn,) = find_ffns(model, torch.randn(2, 16, 512, dtype=dtype))
    assert (ffn.pre, ffn.post) == (model.up, model.down)
