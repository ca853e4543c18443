"""What lies between the projections of an FFN besides an elementwise nonlinearity of the output of
the first: measured correctly, named, or refused."""

import pytest
import torch
from by_hand import Plain, assert_measured
from torch import Tensor, nn
from torch.nn import functional

import nerve
from nerve.errors import MeasurementError

D, FF = 8, 20


class Net(nn.Module):
    """Residual blocks."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Two(nn.Module):
    """Two projections with `between` in between."""

    def __init__(self, d_in: int = D, d_up: int = FF, d_down: int = FF) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_in, d_up), nn.Linear(d_down, D)

    def between(self, u: Tensor) -> Tensor:
        return u.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


def plain() -> Plain:
    return Plain(nn.Linear(D, FF), nn.Linear(FF, D))


def seeded(kind: type[nn.Module]) -> Net:
    """A plain FFN, and a block of this kind."""
    torch.manual_seed(0)
    return Net(plain(), kind()).eval()


X = torch.randn(12, 9, D, generator=torch.Generator().manual_seed(0)).double()


class Overwriting(torch.autograd.Function):
    """SiLU(gate) · up, whose backward pass overwrites and returns both, as fused kernels do."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return functional.silu(gate) * up

    @staticmethod
    def backward(ctx, given):
        gate, up = ctx.saved_tensors
        sigmoid = gate.sigmoid()
        of_gate = given * up * sigmoid * (1 + gate * (1 - sigmoid))
        of_up = given * functional.silu(gate)
        gate.data.copy_(of_gate)
        up.data.copy_(of_up)
        return gate, up


class Fused(nn.Module):
    """Its names say nothing, and the factor is computed first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(D, FF), nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        b = self.b(x)
        return self.c(Overwriting.apply(self.a(x), b))


@pytest.mark.parametrize("is_found", [True, False])
def test_a_backward_pass_that_overwrites_its_inputs_does_not_disturb(is_found):
    net = seeded(Fused)
    block = net.blocks[1]
    ffns = None if is_found else [nerve.FFNAdapter(1, "ffn", block.a, block.c)]
    row = nerve.measure(net, [X], ffns=ffns).to_dict("records")[-1]
    with torch.no_grad():
        x = X + net.blocks[0](X)
        pre = block.a(x)
        assert_measured(row, pre, functional.silu(pre) * block.b(x))


def test_the_factor_of_such_a_function_is_refused_as_pre():
    net = seeded(Fused)
    block = net.blocks[1]
    with pytest.raises(MeasurementError, match="it is the factor that multiplies"):
        nerve.measure(net, [X], ffns=[nerve.FFNAdapter(0, "ffn", block.b, block.c)])


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv2d(D, FF, 1), nn.BatchNorm2d(FF)
        self.down = nn.Conv2d(FF, D, 1)
        self.norm.running_var.uniform_(0.1, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.norm(self.up(x))))


class Scaled(Two):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(FF))

    def between(self, u: Tensor) -> Tensor:
        return functional.gelu(u * self.scale)


class ScaledHalves(Two):
    def __init__(self) -> None:
        super().__init__(d_up=2 * FF)
        self.scale = nn.Parameter(torch.rand(2 * FF))

    def between(self, u: Tensor) -> Tensor:
        gate, up = (u * self.scale).chunk(2, -1)
        return functional.silu(gate) * up


@pytest.mark.parametrize("kind", [Normed, Scaled, ScaledHalves])
def test_pre_is_not_taken_before_a_scale_of_each_feature(kind):
    """The nonlinearity receives other features than the projection returns."""
    torch.manual_seed(0)
    with pytest.raises(MeasurementError, match="scaled feature by feature before the nonlinearity"):
        nerve.find_ffns(Net(kind()).eval(), images() if kind is Normed else X)


def images() -> Tensor:
    return X.movedim(-1, 1)[..., None].expand(-1, -1, -1, 3).contiguous()


def test_the_output_of_batch_normalization_may_be_pre():
    torch.manual_seed(0)
    net = Net(Normed()).eval()
    (block,), x = net.blocks, images()
    ffns = [nerve.FFNAdapter(0, "ffn", nerve.Site(block.norm, "output", axis=1), block.down)]
    (row,) = nerve.measure(net, [x], ffns=ffns).to_dict("records")
    with torch.no_grad():
        pre = block.norm(block.up(x)).movedim(1, -1)
        assert_measured(row, pre, functional.gelu(pre))


class Doubled(Two):
    def between(self, u: Tensor) -> Tensor:
        return functional.gelu(u * 2) / 3


class ScaledAfter(Scaled):
    def between(self, u: Tensor) -> Tensor:
        return u.relu() * self.scale


class Slopes(Two):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.rand(FF))

    def between(self, u: Tensor) -> Tensor:
        return torch.where(u > 0, u, u * self.slope)


@pytest.mark.parametrize("kind", [Doubled, ScaledAfter, Slopes])
def test_a_scale_of_all_features_or_after_the_nonlinearity_is_no_such_scale(kind):
    assert [ffn.layer for ffn in nerve.find_ffns(seeded(kind), X)] == [0, 1]


class Parallel(Two):
    """One projection for attention and FFN, and one for the outputs of both."""

    def __init__(self) -> None:
        super().__init__(d_up=3 * D + FF, d_down=D + FF)

    def between(self, u: Tensor) -> Tensor:
        q, k, v, u = u.split([D, D, D, FF], -1)
        attended = functional.scaled_dot_product_attention(q, k, v)
        return torch.cat([attended, functional.gelu(u)], -1)


class Shards(Two):
    """Gate and factor take turns in blocks."""

    def __init__(self) -> None:
        super().__init__(d_up=2 * FF)

    def between(self, u: Tensor) -> Tensor:
        gate, up = u.unflatten(-1, (2, 2, FF // 2)).unbind(-2)
        return (functional.silu(gate) * up).flatten(-2)


class Folded(Two):
    """Biases are columns of the weights."""

    def __init__(self) -> None:
        super().__init__(D + 1, FF, FF + 1)

    def forward(self, x: Tensor) -> Tensor:
        u = self.up(functional.pad(x, (0, 1), value=1.0))
        return self.down(functional.pad(u.relu(), (0, 1), value=1.0))


class Wide(Two):
    """Receives two tokens."""

    def __init__(self) -> None:
        super().__init__(2 * D)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x.roll(1, 1)], -1))


class Conditioned(Two):
    """A projection of each sequence is added."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(D, FF)

    def forward(self, x: Tensor) -> Tensor:
        u = self.up(x) + self.condition(x.mean(1, keepdim=True))
        return self.down(functional.gelu(u))


class Functional(Two):
    def forward(self, x: Tensor) -> Tensor:
        u = functional.linear(x, self.up.weight, self.up.bias)
        return functional.linear(u.relu(), self.down.weight, self.down.bias)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(n)) for n in ((FF, D), (D, FF)))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.w1).relu(), self.w2)


UNUSUAL = "only some features are one, or they lie in another order or are added to others"
FUNCTIONAL = "are multiplied without a module that runs"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Parallel, UNUSUAL),
        (Shards, UNUSUAL),
        (Folded, UNUSUAL),
        (Conditioned, UNUSUAL),
        (Wide, "it has another number of inputs than of outputs"),
        (Functional, FUNCTIONAL),
        (Bare, FUNCTIONAL),
    ],
)
def test_what_may_be_an_ffn_beside_others_is_named(kind, why):
    torch.manual_seed(0)
    found = nerve.find_ffns(Net(plain(), kind(), plain()).eval(), X)
    assert len(found) == 2
    (line,) = found.unclear
    assert "model.blocks.1" in line
    assert why in line


def test_nothing_is_named_beside_attention_and_recurrences():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
            self.recurrence = nn.LSTM(D, D, batch_first=True)
            self.wide = nn.Linear(D, 4 * D)
            self.out = nn.Linear(2 * D, D)

        def forward(self, x: Tensor) -> Tensor:
            x = self.recurrence(self.attention(x, x, x)[0])[0]
            q, k, v = self.wide(x).split([D, D, 2 * D], -1)
            return self.out(functional.scaled_dot_product_attention(q, k, v))

    found = nerve.find_ffns(seeded(Attending), X)
    assert [ffn.layer for ffn in found] == [0]
    assert found.unclear == []


def test_a_part_of_a_fused_projection_beside_pre_is_refused():
    """Post would depend on some of its columns only."""
    net = seeded(Parallel)
    block = net.blocks[1]
    post = nerve.Site(block.down, "input", slice(D, D + FF))

    def described(start: int) -> list[nerve.FFNAdapter]:
        part = slice(start, start + FF)
        return [nerve.FFNAdapter(0, "ffn", nerve.Site(block.up, "output", part), post)]

    for start in (0, 2 * D, 3 * D - 1):
        with pytest.raises(MeasurementError, match="Pre must be the part of a projection"):
            nerve.measure(net, [X], ffns=described(start))
    (row,) = nerve.measure(net, [X], ffns=described(3 * D)).to_dict("records")
    with torch.no_grad():
        pre = block.up(X + net.blocks[0](X))[..., 3 * D :]
    assert_measured(row, pre, functional.gelu(pre))
