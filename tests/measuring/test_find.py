"""FFNs are found by which features depend on which: forms, gates, places, and unclear cases."""

import pytest
import torch
import torch.distributed.fsdp as fsdp
from by_hand import Plain, assert_measured
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import nerve
from nerve.errors import ConfigError, MeasurementError, NotFiniteError
from nerve.measuring.find import find_ffns
from nerve.nn.ffn import FeedForward

D, FF = 6, 10


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def places(found: list) -> list[tuple[int, str]]:
    return [(ffn.layer, ffn.name) for ffn in found]


class Gated(nn.Module):
    """down(act(one(x)) * two(x)); the names of the projections reveal nothing."""

    def __init__(self, act) -> None:
        super().__init__()
        self.one, self.two, self.down = nn.Linear(D, FF), nn.Linear(D, FF), nn.Linear(FF, D)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.two(x) * self.act(self.one(x)))


class GatedLast(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.one(x) * self.act(self.two(x)))


ACTS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "leaky relu": functional.leaky_relu,
    "squared relu": lambda x: x.relu().square(),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("last", [False, True])
def test_the_gate_is_the_input_of_the_nonlinearity(act, last):
    model = (GatedLast if last else Gated)(ACTS[act]).double()
    x = torch.randn(4, 20, D, dtype=torch.float64)
    (ffn,) = find_ffns(model, x)
    assert ffn.pre is (model.two if last else model.one)
    assert (ffn.post, ffn.gated, ffn.n_runs) == (model.down, True, 1)
    (row,) = nerve.measure(model, [x]).to_dict("records")
    gate, other = (model.two, model.one) if last else (model.one, model.two)
    assert_measured(row, gate(x), model.act(gate(x)) * other(x))


def test_names_decide_if_nothing_else_does():
    """In a product of two projections, neither has a nonlinearity."""
    model = Gated(lambda x: x)
    with pytest.raises(MeasurementError, match="linear in both sides"):
        find_ffns(model, torch.randn(4, 20, D))
    model.gate_proj, model.one = model.one, None
    model.forward = lambda x: model.down(model.gate_proj(x) * model.two(x))
    (ffn,) = find_ffns(model, torch.randn(4, 20, D))
    assert ffn.pre is model.gate_proj


class Packed(nn.Module):
    """Both factors in one projection, as halves or alternating, in either order."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.both, self.down, self.layout = nn.Linear(D, 2 * FF), nn.Linear(FF, D), layout

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = self.both(x)
        a, b = (both[..., ::2], both[..., 1::2]) if "turns" in self.layout else both.chunk(2, -1)
        return (b, a) if "last" in self.layout else (a, b)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.sides(x)
        return self.down(functional.silu(gate) * up)


@pytest.mark.parametrize("layout", ["halves", "halves, last", "turns", "turns, last"])
def test_the_gate_within_a_fused_projection_is_found(layout):
    model = Packed(layout).double()
    x = torch.randn(4, 20, D, dtype=torch.float64)
    (row,) = nerve.measure(model, [x]).to_dict("records")
    gate, up = model.sides(x)
    assert_measured(row, gate, functional.silu(gate) * up)


class MixerBlock(nn.Module):
    """As in timm: token mixing, then channel mixing."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mlp_tokens = Plain(nn.Linear(n_tokens, FF), nn.Linear(FF, n_tokens))
        self.mlp_channels = Plain(nn.Linear(D, 12), nn.Linear(12, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


def test_a_mixer_has_two_ffns_per_layer():
    model = nn.Sequential(*[MixerBlock(8) for _ in range(3)]).double()
    x = torch.randn(30, 8, D, dtype=torch.float64)
    for found in (find_ffns(model, x), find_ffns(model)):
        names = ("mlp_tokens", "mlp_channels")
        assert places(found) == [(layer, name) for layer in range(3) for name in names]
    rows = nerve.measure(model, [x]).to_dict("records")
    for layer, block in enumerate(model):
        tokens = block.mlp_tokens.up(block.norm1(x).transpose(1, 2))
        assert_measured(rows[2 * layer], tokens, tokens.relu())
        x = x + block.mlp_tokens(block.norm1(x).transpose(1, 2)).transpose(1, 2)
        channels = block.mlp_channels.up(block.norm2(x))
        assert_measured(rows[2 * layer + 1], channels, channels.relu())
        x = x + block.mlp_channels(block.norm2(x))


class ConvNeXtBlock(nn.Module):
    """As in timm with `conv_mlp`, or with linear layers on channels moved to the end."""

    def __init__(self, width: int, conv_mlp: bool) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
        make = (lambda i, o: nn.Conv2d(i, o, 1)) if conv_mlp else nn.Linear
        self.mlp = Plain(make(width, 4 * width), make(4 * width, width))
        self.conv_mlp = conv_mlp

    def before(self, x: Tensor) -> Tensor:
        x = self.conv_dw(x)
        return x if self.conv_mlp else x.movedim(1, -1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.before(x))
        return x + (y if self.conv_mlp else y.movedim(-1, 1))


class Stage(nn.Module):
    def __init__(self, d_in: int, width: int, depth: int, conv_mlp: bool) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(d_in, width, 2, stride=2)
        self.blocks = nn.Sequential(*[ConvNeXtBlock(width, conv_mlp) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


@pytest.mark.parametrize("conv_mlp", [True, False])
def test_layers_of_a_convnext_are_numbered_across_its_stages(conv_mlp):
    widths, depths = (4, 5, 6), (1, 2, 1)
    stages = [Stage(*two, n, conv_mlp) for *two, n in zip((3, 4, 5), widths, depths, strict=True)]
    model = nn.Sequential(*stages).double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    found = find_ffns(model, x)
    assert places(found) == [(layer, "ffn") for layer in range(4)]
    assert found.table()["d_ff"].tolist() == [16, 20, 20, 24]
    rows = nerve.measure(model, [x]).to_dict("records")
    for stage in model:
        x = stage.downsample(x)
        for block in stage.blocks:
            pre = block.mlp.up(block.before(x))
            pre = pre.movedim(1, -1) if conv_mlp else pre
            assert_measured(rows.pop(0), pre, pre.relu())
            x = block(x)


class Attention(nn.Module):
    """With more features inside than outside, so that its widths look like those of an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, FF) for _ in range(3))
        self.o = nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.o((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))


class Block(nn.Module):
    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.attention, self.norm, self.mlp = Attention(), nn.LayerNorm(D), ffn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm(x))


def test_attention_is_not_an_ffn():
    model = nn.Sequential(*[Block(Plain(nn.Linear(D, FF), nn.Linear(FF, D))) for _ in range(2)])
    for batch in (torch.randn(3, 7, D), None):
        found = find_ffns(model, batch)
        assert [ffn.pre for ffn in found] == [block.mlp.up for block in model]
    with pytest.raises(MeasurementError, match="No FFN was found in a forward pass of Attention"):
        find_ffns(Attention(), torch.randn(3, 7, D))


class GatedAttention(Attention):
    """Its output is multiplied elementwise by an activation of a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, FF)

    def forward(self, x: Tensor) -> Tensor:
        attended = (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
        return self.o(attended * self.gate(x).sigmoid())


def test_gated_attention_is_not_an_ffn():
    with pytest.raises(MeasurementError, match="No FFN was found"):
        find_ffns(GatedAttention(), torch.randn(3, 7, D))


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 3), nn.Linear(3, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * 2)


def test_two_projections_without_a_nonlinearity_are_not_an_ffn():
    with pytest.raises(MeasurementError, match=r"pass of LowRank\. Describe each"):
        find_ffns(LowRank(), torch.randn(3, 7, D))


def test_a_glob_without_a_match_raises_with_existing_paths():
    model = nn.Sequential(*[Block(Plain(nn.Linear(D, FF), nn.Linear(FF, D))) for _ in range(2)])
    with pytest.raises(
        MeasurementError, match=r"no module of Sequential matches '\*\.ffn'.*\*\.mlp"
    ):
        find_ffns(model, torch.randn(3, 7, D), select="*.ffn")
    with pytest.raises(MeasurementError, match=r"No FFN that matches select='\*\.norm' was found"):
        find_ffns(model, torch.randn(3, 7, D), select="*.norm")


class NormedWithin(Plain):
    def __init__(self) -> None:
        super().__init__(nn.Linear(D, FF), nn.Linear(FF, D))
        self.norm = nn.LayerNorm(FF)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.act(self.up(x))))


def test_an_unclear_ffn_is_reported_with_the_line_that_describes_it():
    model = nn.Sequential(Plain(nn.Linear(D, FF), nn.Linear(FF, D)), NormedWithin()).double()
    x = torch.randn(3, 30, D, dtype=torch.float64)
    found = find_ffns(model, x)
    assert places(found) == [(0, "ffn")]
    (line,) = found.unclear
    code, why = line.split("  # ")
    assert why == "features are mixed in between, for example by a normalization"
    assert line in str(found)
    ffn = eval(code.replace("model.1.", "model[1]."), {"nerve": nerve, "model": model})
    (row,) = nerve.measure(model, [x], ffns=[ffn]).to_dict("records")
    pre = model[1].up(model[0](x))
    assert_measured(row, pre, model[1].norm(pre.relu()))


class Declaring(Plain):
    """A whole network that declares its width."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(D, FF), nn.Linear(FF, D))
        self.in_features = self.out_features = D


def test_an_unclear_ffn_is_numbered_with_the_others():
    """Its line can be used as it is, and leaves the layers of the others as they are."""
    plain = [Plain(nn.Linear(D, FF), nn.Linear(FF, D)) for _ in range(2)]
    model = nn.Sequential(NormedWithin(), plain[0], NormedWithin(), plain[1]).double()
    x = torch.randn(3, 30, D, dtype=torch.float64)
    found = find_ffns(model, x)
    assert places(found) == [(1, "ffn"), (3, "ffn")]
    lines = [
        line.replace("model.0.", "model[0].").replace("model.2.", "model[2].")
        for line in found.unclear
    ]
    by_hand = [eval(line, {"nerve": nerve, "model": model}) for line in lines]
    assert places(by_hand) == [(0, "ffn"), (2, "ffn")]
    rows = nerve.measure(model, [x], ffns=[*found, *by_hand])
    assert sorted(rows["layer"]) == [0, 1, 2, 3]


class Both(nn.Module):
    """A block with an FFN named `mlp` and one named `ffn` that is unclear."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.mlp = NormedWithin(), Plain(nn.Linear(D, FF), nn.Linear(FF, D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x + self.ffn(x))


def test_an_unclear_ffn_does_not_change_the_names_of_others():
    found = find_ffns(nn.Sequential(Both(), Both()), torch.randn(3, 30, D))
    assert places(found) == [(0, "ffn"), (1, "ffn")]
    assert [line.partition(", model")[0] for line in found.unclear] == [
        'nerve.FFNAdapter(0, "ffn_2"',
        'nerve.FFNAdapter(1, "ffn_2"',
    ]


def test_select_applies_to_unclear_ffns():
    model = nn.Sequential(NormedWithin(), Plain(nn.Linear(D, FF), nn.Linear(FF, D)))
    found = find_ffns(model, torch.randn(3, 30, D), select="1")
    assert (places(found), found.unclear) == ([(0, "ffn")], [])


def test_a_model_without_ffns_raises_with_the_projections_that_ran():
    model = nn.Sequential(nn.Linear(D, FF), nn.Linear(FF, D))
    words = (
        r"2 projections ran: model\.0, model\.1\. No nonlinearity was seen between model\.0 and "
        r"model\.1\."
    )
    with pytest.raises(MeasurementError, match=words):
        find_ffns(model, torch.randn(4, D))
    with pytest.raises(MeasurementError, match="None of its 0 projections ran"):
        find_ffns(nn.LayerNorm(D), torch.randn(4, D))


def test_a_network_that_declares_its_width_is_not_a_projection():
    model = Declaring()
    (ffn,) = find_ffns(nn.Sequential(model, nn.Linear(D, D)), torch.randn(3, 30, D))
    assert ffn.pre is model.up


def test_bare_layers_of_a_sequential_are_numbered_in_order():
    def two() -> list[nn.Module]:
        return [nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D)]

    model = nn.Sequential(*two(), *two())
    assert places(find_ffns(model, torch.randn(9, D))) == [(0, "ffn"), (1, "ffn")]


def test_a_classifier_of_two_layers_is_an_ffn_only_if_there_is_no_other():
    model = nn.Sequential(nn.Linear(D, FF), nn.ReLU(), nn.Linear(FF, 3))
    assert places(find_ffns(model, torch.randn(9, D))) == [(0, "ffn")]
    block = Plain(nn.Linear(D, FF), nn.Linear(FF, D))
    both = nn.Sequential(block, model)
    assert [ffn.pre for ffn in find_ffns(both, torch.randn(9, D))] == [block.up]
    assert [ffn.pre for ffn in find_ffns(both, torch.randn(9, D), select="1*")] == [model[0]]


def test_select_accepts_paths_and_layers_accepts_numbers():
    model = nn.ModuleDict({"blocks": nn.Sequential(*[MixerBlock(8) for _ in range(2)])})
    model.forward = lambda x: model["blocks"](x)
    x = torch.randn(3, 8, D)
    channels = find_ffns(model, x, select="*.mlp_channels")
    assert [ffn.post for ffn in channels] == [b.mlp_channels.down for b in model["blocks"]]
    assert {ffn.layer for ffn in find_ffns(model, x, layers=[1])} == {1}
    with pytest.raises(MeasurementError, match="no module of ModuleDict matches 'x'"):
        find_ffns(model, x, select="x")
    with pytest.raises(MeasurementError, match="with FFNs, 0, 1; got 2"):
        find_ffns(model, x, layers=[2])


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(), Stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x + self.encoder(x).mean(1, keepdim=True))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        ffns = [Plain(nn.Linear(D, FF), nn.Linear(FF, D)) for _ in range(2)]
        self.layers = nn.ModuleList(ffns)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_an_encoder_and_a_decoder_are_numbered_separately():
    found = find_ffns(EncoderDecoder(), torch.randn(3, 7, D))
    names = ("encoder_ffn", "decoder_ffn")
    assert places(found) == [(layer, name) for layer in range(2) for name in names]


class Recurrent(nn.Module):
    """Overwrites its state, so that it has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x: Tensor) -> Tensor:
        state = self.a(x)
        gate = state.exp()
        state.mul_(gate)
        gate.add_(1)
        return self.b(state)


def test_modules_without_a_derivative_are_not_ffns_and_hide_none():
    ffn = Plain(nn.Linear(D, FF), nn.Linear(FF, D))
    (found,) = find_ffns(nn.Sequential(Recurrent(), ffn), torch.randn(3, 7, D))
    assert found.pre is ffn.up


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = Plain(nn.Linear(D, FF), nn.Linear(FF, D))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.ffn(x)
        return x


def test_a_looped_ffn_is_found_once_and_pools_its_runs():
    model = Looped()
    (ffn,) = find_ffns(model, torch.randn(4, 20, D))
    assert ffn.n_runs is None
    assert nerve.measure(model, [torch.randn(4, 20, D)]).n_samples.item() == 240


def test_a_nonlinearity_that_overwrites_its_input_is_found_and_then_raises():
    model = Plain(nn.Linear(D, FF), nn.Linear(FF, D))
    model.act = nn.ReLU(inplace=True)
    assert len(find_ffns(model, torch.randn(9, D))) == 1
    with pytest.raises(MeasurementError, match="overwrites it"):
        nerve.measure(model, [torch.randn(9, D)])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("batch", [torch.randn(3, 30, D), None])
def test_a_scripted_nonlinearity_is_one_like_any_other(batch):
    model = Plain(nn.Linear(D, FF), nn.Linear(FF, D))
    model.act = torch.jit.script(nn.GELU())
    (ffn,) = find_ffns(nn.Sequential(model), batch)
    assert (ffn.pre, ffn.post) == (model.up, model.down)


def test_find_ffns_leaves_the_model_unchanged():
    model = nn.Sequential(*[Block(Gated(functional.silu)) for _ in range(2)]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    find_ffns(model, torch.randn(3, 7, D, generator=torch.Generator().manual_seed(0)))
    find_ffns(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for module in model.modules():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert parameter.grad is None


def test_found_ffns_print_as_a_table():
    model = nn.Sequential(*[Block(Gated(functional.silu)) for _ in range(2)])
    table = find_ffns(model, torch.randn(3, 7, D)).table()
    columns = ["layer", "name", "pre", "post", "d_in", "d_ff", "gated", "n_runs", "pool"]
    assert table.columns.tolist() == columns
    assert table.iloc[1].tolist() == [1, "ffn", "1.mlp.one", "1.mlp.down", D, FF, True, 1, None]


def test_uninformative_columns_are_not_printed():
    """And nerve's own FFNs say whether they are gated."""
    model = nn.ModuleList(FeedForward(D, FF, nn.GELU(), gated=i > 0, layer=i) for i in range(2))
    head, first, second = str(find_ffns(model)).splitlines()
    assert head.split() == ["layer", "name", "pre", "post", "d_in", "d_ff", "gated"]
    assert (first.split()[-1], second.split()[-1]) == ("False", "True")


class NeedsMore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, FF), nn.Linear(FF, D)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) * scale


def test_a_model_whose_blocks_cannot_run_alone_asks_for_a_batch():
    with pytest.raises(MeasurementError, match=r"Give a batch, nerve.find_ffns\(model, batch\)"):
        find_ffns(NeedsMore())
    batch = {"x": torch.randn(3, 7, D), "scale": torch.ones(())}
    assert len(find_ffns(NeedsMore(), batch)) == 1


class Checkpointed(nn.Module):
    """An FFN whose activations are not kept for the backward pass; None keeps them."""

    def __init__(self, use_reentrant: bool | None = False) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return x + self.ffn(x)
        return x + checkpoint(self.ffn, x, use_reentrant=self.use_reentrant)

    def ffn(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


# Of torch, where the input of the first block needs no derivative.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_ffns_hidden_by_activation_checkpointing_are_named(use_reentrant):
    """Alone they raise; next to FFNs that are found, they are reported."""
    x, hidden = torch.randn(4, 6, 8), [Checkpointed(use_reentrant) for _ in range(2)]
    words = r"model\.0\.down and 1 more: autograd does not record how .* \(activation ch"
    with pytest.raises(MeasurementError, match=rf"Describe each with nerve\.FFNAdapter.*{words}"):
        nerve.find_ffns(nn.Sequential(*hidden), x)
    found = nerve.find_ffns(nn.Sequential(Checkpointed(None), hidden[0]), x)
    assert [ffn.layer for ffn in found] == [0]
    (line,) = found.unclear
    assert line.startswith("# model.1.down: autograd does not record how their inputs are computed")
    assert nerve.find_ffns(nn.Sequential(Checkpointed(None)), x).unclear == []


def test_ffns_that_run_without_autograd_are_named():
    """Like a frozen part of a model."""

    class Frozen(Checkpointed):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return x + self.ffn(x)

    found = nerve.find_ffns(nn.Sequential(Frozen(), Checkpointed(None)), torch.randn(4, 6, 8))
    assert [type(ffn.post) for ffn in found] == [nn.Linear]
    assert [line.partition(":")[0] for line in found.unclear] == ["# model.0.down"]


def test_with_activation_checkpointing_ffns_are_described_by_hand():
    """What runs again for a derivative differs from the forward pass, so no FFN can be recognized
    in it."""
    torch.manual_seed(0)
    model, x = Checkpointed(), torch.randn(40, 6, 8)
    ffns = [nerve.FFNAdapter(0, "ffn", model.up, model.down)]
    (row,) = nerve.measure(model, [x], ffns=ffns).itertuples()
    with torch.no_grad():
        h = model.act(model.up(x)).double().flatten(0, 1)
    covariance = torch.cov(h.T)
    assert row.status == "ok"
    assert row.pr_post == pytest.approx(
        float(covariance.trace() ** 2 / covariance.square().sum()), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["FullyShardedDataParallel", "FSDPModule"])
def test_ffns_are_found_before_a_model_is_sharded(kind):
    """A part that runs separately would initialize FSDP's state, and training would fail."""
    sharded = getattr(fsdp, kind)
    block = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4))
    own = {"forward": nn.Sequential.forward, "__getattr__": nn.Module.__getattr__}
    block.__class__ = type("Sharded", (sharded, nn.Sequential), own)
    with pytest.raises(MeasurementError, match=r"sharded \(FSDP\).*before it is sharded"):
        nerve.find_ffns(nn.Sequential(block))


def test_weights_and_batches_without_values_raise():
    """The message names what is missing, not the model."""
    model = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4))
    with pytest.raises(MeasurementError, match=r"must have samples; got .*\(0, 4\)"):
        nerve.measure(model, [torch.zeros(0, 4), torch.zeros(9, 4)])
    with pytest.raises(MeasurementError, match="meta device"):
        nerve.find_ffns(model.to("meta"))


def test_a_parametrized_convolution_is_no_stack_of_experts():
    """As in wav2vec 2.0."""
    convolution = nn.utils.parametrizations.weight_norm(nn.Conv1d(D, D, 3, padding=1))

    class Positions(Plain):
        def __init__(self) -> None:
            super().__init__(nn.Linear(D, FF), nn.Linear(FF, D))
            self.positions = convolution

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.positions(x.mT).mT)

    assert find_ffns(Positions(), torch.randn(3, 7, D)).unclear == []


def test_lazy_modules_must_have_run(tmp_path):
    model, x = nn.Sequential(nn.LazyLinear(12), nn.GELU(), nn.Linear(12, 4)), torch.randn(9, 4)
    for look in (nerve.find_ffns, lambda model, x: nerve.measure(model, [x])):
        with pytest.raises(
            ConfigError, match=r"must have sizes; 0\.weight is that of a lazy module"
        ):
            look(model, x)
    with pytest.raises(ConfigError, match="lazy"), nerve.watch(model, tmp_path):
        pass
    model(x)
    assert len(nerve.find_ffns(model, x)) == 1


@pytest.mark.parametrize("with_batch", [True, False])
def test_a_model_that_has_diverged_shows_no_ffn_and_is_named_as_such(with_batch):
    """Instead of some of its FFNs; described by hand, all have rows that say so."""
    model = nn.Sequential(*(Checkpointed(None) for _ in range(3)))
    model[1].up.weight.data[3, 2] = torch.nan
    x = torch.randn(4, 6, 8)
    with pytest.raises(NotFiniteError, match=r"those of model\.1\.up are not, in any sample"):
        nerve.find_ffns(model, x if with_batch else None)
    ffns = [nerve.FFNAdapter(i, "ffn", each.up, each.down) for i, each in enumerate(model)]
    rows = nerve.measure(model, [x], ffns=ffns)
    assert rows["status"].tolist() == ["ok", "non_finite", "non_finite"]


def test_logits_that_are_masked_by_an_infinite_bias_are_no_divergence():
    model = nn.Sequential(Checkpointed(None), nn.Linear(8, 5))
    model[1].bias.data[-1] = -torch.inf
    assert len(nerve.find_ffns(model, torch.randn(4, 6, 8))) == 1


@pytest.mark.parametrize("batch", [torch.randn(1, 8), {"x": torch.randn(1, 1, 8)}])
def test_a_single_sample_raises_because_it_shows_no_ffn(batch):
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(model: nn.Module, batch: object) -> Tensor:
        return model(batch["x"] if isinstance(batch, dict) else batch)

    with pytest.raises(MeasurementError, match="A single sample shows none: put a batch with more"):
        nerve.find_ffns(model, batch, forward=forward)


class Residual(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def test_a_dead_ffn_is_found_and_its_rows_say_so():
    """In its place: the layers of the others do not depend on it."""
    model = nn.Sequential(*(Residual(nn.Linear(D, FF), nn.Linear(FF, D)) for _ in range(3)))
    nn.init.constant_(model[0].up.bias, -1e3)
    x = torch.randn(4, 20, D)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = find_ffns(model, x)
    assert [(ffn.layer, ffn.pre) for ffn in found] == [(i, model[i].up) for i in range(3)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    statuses = nerve.measure(model, [x], ffns=found)["status"].tolist()
    assert statuses == ["zero_variance_post", "ok", "ok"]
    assert len(find_ffns(nn.Sequential(model[0]), x)) == 1


def test_an_ffn_in_the_linear_part_of_its_nonlinearity_is_found():
    model = nn.Sequential(*(Plain(nn.Linear(D, FF), nn.Linear(FF, D)) for _ in range(2)))
    nn.init.constant_(model[0].up.bias, 1e3)
    assert [ffn.pre for ffn in find_ffns(model, torch.randn(4, 20, D))] == [b.up for b in model]


def test_a_nonlinearity_that_random_features_make_nan_does_not_pass_for_a_diverged_model():
    """A root of one everywhere, which the second pass gives negative numbers."""
    model = nn.Sequential(*(Residual(nn.Linear(D, FF), nn.Linear(FF, D)) for _ in range(2)))
    between = nn.Sequential(nn.Linear(D, FF), Root(), nn.Linear(FF, D))
    nn.init.zeros_(between[0].weight)
    nn.init.ones_(between[0].bias)
    found = find_ffns(nn.Sequential(model[0], between, model[1]), torch.randn(4, 20, D))
    assert [ffn.pre for ffn in found] == [block.up for block in model]


@pytest.mark.parametrize("zero", ["one", "two"])
def test_the_gate_is_found_if_one_of_the_factors_is_zero(zero):
    """As it is initialized, or because it is dead; the other factor alone would look plain."""
    model = Gated(functional.silu)
    for parameter in getattr(model, zero).parameters():
        nn.init.zeros_(parameter)
    (ffn,) = find_ffns(model, torch.randn(4, 20, D))
    assert (ffn.pre, ffn.gated) == (model.one, True)


@pytest.mark.parametrize("n_without", [10, 20])
def test_ffns_are_found_in_the_finite_samples(n_without):
    """Though padding is NaN in the first two sequences, or nothing in them is finite."""
    x = torch.randn(4, 20, D)
    x[:2, -n_without:] = torch.nan
    model = nn.Sequential(
        Gated(functional.silu), Packed("halves"), Plain(nn.Linear(D, FF), nn.Linear(FF, D))
    )
    found = find_ffns(model, x)
    assert [ffn.gated for ffn in found] == [True, True, False]
    assert found[0].pre is model[0].one


def test_samples_without_a_positive_feature_do_not_make_an_ffn_unclear():
    model = Plain(nn.Linear(D, FF, bias=False), nn.Linear(FF, D))
    x = torch.randn(4, 20, D)
    x[:, ::2] = 0
    found = find_ffns(model, x)
    assert [ffn.pre for ffn in found] == [model.up]
