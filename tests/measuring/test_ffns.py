"""Descriptions of FFNs are measured as promised, or raise: axes, parts, runs, order."""

import math

import numpy as np
import pytest
import torch
from by_hand import Plain, assert_measured
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import nerve
from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFNAdapter, Site
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("n_axes", [1, 2, 3])
def test_a_pointwise_convolution_is_measured_along_its_channels(n_axes, shortcut):
    """The samples are images × positions, also if another axis is as wide as the channels."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n_axes - 1]
    model = Plain(conv(6, 9, 1), conv(9, 6, 1)).double()
    x = torch.randn(9, 6, *[9] * n_axes, dtype=torch.float64)
    ffns = [FFNAdapter(0, "ffn", model.up, model.down)]
    (row,) = nerve.measure(model, [x], ffns=ffns, shortcut=shortcut).to_dict("records")
    pre = model.up(x).movedim(1, -1)
    assert_measured(row, pre, pre.relu())
    assert row["d_in"] == 6
    assert 0 < row["variance_outside"] < 1


@pytest.mark.parametrize("kind", ["linear", "convolution", "Conv1D of transformers"])
def test_any_kind_of_projection_takes_the_shortcut(kind):
    """The covariance is that of its input: 6 wide, not 9."""
    up, down = {
        "linear": lambda: (nn.Linear(6, 9), nn.Linear(9, 6)),
        "convolution": lambda: (nn.Conv1d(6, 9, 1), nn.Conv1d(9, 6, 1)),
        "Conv1D of transformers": lambda: (Conv1D(9, 6), Conv1D(6, 9)),
    }[kind]()
    model = Plain(up, down).double()
    x = torch.randn(40, 6, 5, dtype=torch.float64)
    x = x if kind == "convolution" else x.movedim(1, -1).contiguous()
    probe = Probe([FFNAdapter(0, "ffn", model.up, model.down)])
    probe.install()
    measurement = Measurement(probe)
    measurement.start()
    with torch.no_grad():
        model(x)
    measurement.finish_forward()
    probe.remove()
    (problem,) = measurement.eigenproblems()
    assert problem.of_input
    assert problem.before.shape == (6, 6)


def test_the_rank_of_a_wide_convolution_is_bounded_by_all_its_inputs():
    model = Plain(nn.Conv2d(2, 16, 3), nn.Conv2d(16, 2, 1)).double()
    x = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    ffns = [FFNAdapter(0, "ffn", model.up, model.down)]
    (row,) = nerve.measure(model, [x], ffns=ffns).to_dict("records")
    pre = model.up(x).movedim(1, -1)
    assert_measured(row, pre, pre.relu())
    assert row["d_in"] == 18
    assert math.isnan(row["variance_outside"])


def test_an_axis_of_another_width_than_declared_raises():
    class Turned(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(-1, -2)

    model = Plain(Turned(6, 9), nn.Linear(5, 3))
    ffns = [FFNAdapter(0, "ffn", model.up, model.down)]
    with pytest.raises(MeasurementError, match="as wide as Turned declares, 9"):
        nerve.measure(model, [torch.randn(4, 5, 6)], ffns=ffns)


class Fused(nn.Module):
    """Both factors of a gated FFN from one projection, as halves or alternating."""

    def __init__(self, halves: bool, act: nn.Module | None = None) -> None:
        super().__init__()
        self.both, self.down, self.halves = nn.Linear(6, 32), nn.Linear(16, 6), halves
        self.act = nn.SiLU() if act is None else act

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = self.both(x)
        return both.chunk(2, -1) if self.halves else (both[..., ::2], both[..., 1::2])

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.sides(x)
        return self.down(self.act(gate) * up)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("halves", [True, False])
def test_a_part_of_a_fused_projection_is_measured_with_its_part_of_the_weight(halves, shortcut):
    model = Fused(halves).double()
    part = slice(0, 16) if halves else slice(0, None, 2)
    ffns = [FFNAdapter(0, "ffn", Site(model.both, "output", part), model.down)]
    x = torch.randn(50, 6, dtype=torch.float64)
    (row,) = nerve.measure(model, [x], ffns=ffns, shortcut=shortcut).to_dict("records")
    gate, up = model.sides(x)
    assert_measured(row, gate, nn.functional.silu(gate) * up)
    assert row["d_in"] == 6
    post = (nn.functional.silu(gate) * up).detach().numpy()
    basis, _ = np.linalg.qr(model.both.weight[part].detach().numpy())
    centred = post - post.mean(0)
    outside = 1 - np.square(centred @ basis).sum() / np.square(centred).sum()
    assert row["variance_outside"] == pytest.approx(outside, rel=1e-9)


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.ReLU(), nn.LeakyReLU(), nn.Sigmoid()])
def test_the_part_that_multiplies_is_not_pre(halves, act):
    model = Fused(halves, act)
    parts = (slice(0, 16), slice(16, 32)) if halves else (slice(0, None, 2), slice(1, None, 2))
    gate, up = ([FFNAdapter(0, "ffn", Site(model.both, "output", p), model.down)] for p in parts)
    x = torch.randn(50, 6)
    assert nerve.measure(model, [x], ffns=gate).status.item() == "ok"
    with pytest.raises(MeasurementError, match="the factor that multiplies the output"):
        nerve.measure(model, [x], ffns=up)


@pytest.mark.parametrize("n_others", [16, 20])
@pytest.mark.parametrize("act", [nn.LeakyReLU(), nn.PReLU(init=3.0), nn.ReLU(), nn.GELU()])
def test_columns_for_something_else_are_no_factor(act, n_others):
    """One projection computes pre and, for example, the queries of an attention beside the FFN."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.down = nn.Linear(6, 16 + n_others), nn.Linear(16, 6)
            self.act, self.out = act, nn.Linear(n_others, 6)

        def forward(self, x: Tensor) -> Tensor:
            both = self.both(x)
            return self.down(self.act(both[..., :16])) + self.out(both[..., 16:])

    model, x = Parallel().double(), torch.randn(50, 6, dtype=torch.float64)
    ffns = [FFNAdapter(0, "ffn", Site(model.both, "output", slice(16)), model.down)]
    (row,) = nerve.measure(model, [x], ffns=ffns).to_dict("records")
    pre = model.both(x)[..., :16]
    assert_measured(row, pre, model.act(pre))


def test_a_fused_projection_without_its_part_raises():
    model = Fused(True)
    ffns = [FFNAdapter(0, "ffn", model.both, model.down)]
    with pytest.raises(MeasurementError, match="same samples and width"):
        nerve.measure(model, [torch.randn(50, 6)], ffns=ffns)


def test_pre_may_be_the_input_of_an_activation():
    model = Plain(nn.Linear(6, 16), nn.Linear(16, 6)).double()
    ffns = [FFNAdapter(0, "ffn", Site(model.act, "input"), model.down)]
    x = torch.randn(50, 6, dtype=torch.float64)
    (row,) = nerve.measure(model, [x], ffns=ffns).to_dict("records")
    assert_measured(row, model.up(x), model.up(x).relu())


def test_the_output_of_an_activation_as_pre_raises():
    model = Plain(nn.Linear(6, 16), nn.Linear(16, 6))
    for pre in (model.act, Site(model.act, "output")):
        with pytest.raises(MeasurementError, match="it is the output of ReLU, which has no weight"):
            nerve.measure(model, [torch.randn(9, 6)], ffns=[FFNAdapter(0, "ffn", pre, model.down)])


@pytest.mark.parametrize("residual", [False, True])
def test_pre_of_one_layer_with_post_of_the_next_raises(residual):
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Plain(nn.Linear(6, 9), nn.Linear(9, 6)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) + (x if residual else 0)
            return x

    model = Stack()
    ffns = [FFNAdapter(0, "ffn", model.blocks[0].up, model.blocks[1].down)]
    with pytest.raises(MeasurementError, match="for ffn in layer 0 it depends on pre through a m"):
        nerve.measure(model, [torch.randn(9, 6)], ffns=ffns)


def test_post_that_does_not_depend_on_pre_raises():
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Plain(nn.Linear(6, 9), nn.Linear(9, 6))
            self.other = Plain(nn.Linear(6, 9), nn.Linear(9, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x)

    model = Parallel()
    ffns = [FFNAdapter(0, "ffn", model.one.up, model.other.down)]
    with pytest.raises(MeasurementError, match="it depends on pre not at all"):
        nerve.measure(model, [torch.randn(9, 6)], ffns=ffns)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert all(parameter.requires_grad for parameter in model.parameters())


class Repeated(nn.Module):
    """Runs its FFN as often as the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = Plain(nn.Linear(6, 9), nn.Linear(9, 6))

    def forward(self, x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = self.ffn(x)
        return x


def test_all_runs_of_a_shared_layer_are_pooled():
    model = Repeated().double()
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down, n_runs=None)]
    batches = [{"x": torch.randn(20, 6).double(), "times": times} for times in (3, 0, 1)]
    (row,) = nerve.measure(model, batches, ffns=ffns).to_dict("records")
    pre, x = [], batches[0]["x"]
    for _ in range(3):
        pre.append(model.ffn.up(x))
        x = model.ffn(x)
    pre = torch.cat([*pre, model.ffn.up(batches[2]["x"])])
    assert_measured(row, pre, pre.relu())


@pytest.mark.parametrize(("promised", "times"), [(1, 0), (1, 2), (2, 1), (2, 3)])
def test_a_wrong_number_of_runs_raises_with_the_number(promised, times):
    model = Repeated()
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down, n_runs=promised)]
    batch = {"x": torch.randn(20, 6), "times": times}
    with pytest.raises(MeasurementError, match=f"n_runs={promised} per .* it ran {times} times"):
        nerve.measure(model, [batch], ffns=ffns)


def test_an_optional_ffn_that_never_ran_has_too_few_samples():
    model = Repeated()
    ffns = [FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down, n_runs=None)]
    batch = {"x": torch.randn(20, 6), "times": 0}
    (row,) = nerve.measure(model, [batch], ffns=ffns).to_dict("records")
    assert (row["n_samples"], row["status"]) == (0, "too_few_samples")
    assert (row["d_in"], row["d_ff"]) == (6, 9)


class ByKeyword(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(input=self.act(self.up(input=x)))


def test_an_input_by_keyword_is_measured():
    model = ByKeyword(nn.Linear(6, 16), nn.Linear(16, 6)).double()
    ffns = [FFNAdapter(0, "ffn", model.up, model.down)]
    x = torch.randn(50, 6, dtype=torch.float64)
    (row,) = nerve.measure(model, [x], ffns=ffns).to_dict("records")
    assert_measured(row, model.up(x), model.up(x).relu())
    assert row["d_in"] == 6


class EndsEarly(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def test_pre_without_post_raises():
    model = EndsEarly(nn.Linear(6, 16), nn.Linear(16, 6))
    ffns = [FFNAdapter(0, "ffn", model.up, model.down, n_runs=None)]
    with pytest.raises(MeasurementError, match="for ffn in layer 0 it was never computed"):
        nerve.measure(model, [torch.randn(9, 6)], ffns=ffns)


class Reused(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)) + self.up(x + 1))


def test_pre_twice_before_post_raises():
    model = Reused(nn.Linear(6, 16), nn.Linear(16, 6))
    ffns = [FFNAdapter(0, "ffn", model.up, model.down, n_runs=None)]
    with pytest.raises(MeasurementError, match="for ffn in layer 0 pre was computed twice"):
        nerve.measure(model, [torch.randn(9, 6)], ffns=ffns)


def test_nested_tensors_raise_before_any_arithmetic():
    model = Plain(nn.Linear(6, 16), nn.Linear(16, 6))
    ffns = [FFNAdapter(0, "ffn", model.up, model.down)]
    nested = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(5, 6)], layout=torch.jagged)
    with pytest.raises(MeasurementError, match=r"plain, strided tensor; .* is nested"):
        nerve.measure(model, [nested], ffns=ffns)


def test_features_on_a_device_without_float64_raise(monkeypatch):
    """Such as Apple's GPUs, where torch's own error would come from the middle of the sums."""
    monkeypatch.setattr("nerve.measuring.tap._WITHOUT_FLOAT64", ("cpu",))
    model = Plain(nn.Linear(6, 16), nn.Linear(16, 6))
    ffns = [FFNAdapter(0, "ffn", model.up, model.down)]
    with pytest.raises(MeasurementError, match="input of ffn in layer 0 is on cpu"):
        nerve.measure(model, [torch.randn(9, 6)], ffns=ffns)


class Labeled(Tensor):
    """A subclass that carries metadata, as in some libraries."""


def test_a_subclass_that_only_carries_metadata_is_measured():
    model = Plain(nn.Linear(6, 16), nn.Linear(16, 6)).double()
    ffns = [FFNAdapter(0, "ffn", model.up, model.down)]
    x = torch.randn(50, 6, dtype=torch.float64)
    (row,) = nerve.measure(model, [x.as_subclass(Labeled)], ffns=ffns).to_dict("records")
    assert_measured(row, model.up(x), model.up(x).relu())


def test_samples_flattened_between_pre_and_post_are_the_same():
    flat = nn.Sequential(nn.Flatten(0, -2), nn.Linear(16, 6))
    model = Plain(nn.Linear(6, 16), flat).double()
    ffns = [FFNAdapter(0, "ffn", model.up, flat[1])]
    x, mask = torch.randn(4, 5, 6).double(), torch.rand(4, 5) > 0.4
    (row,) = nerve.measure(model, [x], ffns=ffns, mask=lambda _: mask).to_dict("records")
    pre = model.up(x)[mask]
    assert_measured(row, pre, pre.relu())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = Plain(nn.Linear(6, 16), nn.Linear(16, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x)


def test_dependence_is_checked_once_and_autograd_is_restored():
    """Outside of `measure`, with and without gradients."""
    model = Pair().requires_grad_(False)
    probe = Probe([FFNAdapter(0, "ffn", model.ffn.up, model.ffn.down)])
    probe.install()
    measurement = Measurement(probe)
    with torch.no_grad():
        for _ in range(2):
            measurement.start()
            output = model(torch.randn(9, 6))
            assert not torch.is_grad_enabled()
            assert not output.requires_grad
            measurement.finish_forward()
    probe.remove()


class Fails(Plain):
    def forward(self, x: Tensor) -> Tensor:
        self.up(x)
        raise ValueError("between the sides")


def test_an_error_between_pre_and_post_leaves_gradients_on():
    """The context that turned them off has ended before the probe is stopped."""
    model = Fails(nn.Linear(6, 9), nn.Linear(9, 6))
    probe = Probe([FFNAdapter(0, "ffn", model.up, model.down)])
    probe.install()
    measurement = Measurement(probe)
    measurement.start()
    with pytest.raises(ValueError, match="between"), torch.no_grad():
        model(torch.randn(9, 6))
    measurement.stop()
    probe.remove()
    assert torch.is_grad_enabled()


class OverwritesHalf(Fused):
    """Like a fused kernel, in plain torch: the second half becomes the product."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.sides(x)
        return self.down(up.mul_(nn.functional.silu(gate)))


def test_operations_that_autograd_cannot_record_raise_with_the_reason():
    model = OverwritesHalf(True)
    ffns = [FFNAdapter(0, "ffn", Site(model.both, "output", slice(0, 16)), model.down)]
    for described in (ffns, None):
        with pytest.raises(MeasurementError, match="modified inplace"):
            nerve.measure(model, [torch.randn(9, 6)], ffns=described)


class Gated(nn.Module):
    def __init__(self, act) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


GATES = [nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.ReLU(), nn.LeakyReLU(), nn.Hardtanh(0, 1e9)]


@pytest.mark.parametrize("act", GATES)
def test_the_factor_that_multiplies_is_not_pre(act):
    model = Gated(act)
    x = torch.randn(50, 6)
    rows = nerve.measure(model, [x], ffns=[FFNAdapter(0, "ffn", model.gate, model.down)])
    assert rows.status.item() == "ok"
    with pytest.raises(MeasurementError, match="the factor that multiplies the output"):
        nerve.measure(model, [x], ffns=[FFNAdapter(0, "ffn", model.up, model.down)])


@pytest.mark.parametrize("kind", ["two projections", "behind a norm", "halves"])
def test_either_factor_of_a_bilinear_ffn_may_be_pre(kind):
    """It has no other nonlinearity; that takes more samples than inputs to see."""
    torch.manual_seed(0)
    fused, model = Fused(True, nn.Identity()).double(), Gated(nn.Identity()).double()
    norm = nn.LayerNorm(6, elementwise_affine=False) if kind == "behind a norm" else nn.Identity()
    x = norm(torch.randn(90, 6, dtype=torch.float64))
    if kind == "halves":
        sides, down, whole = fused.sides(x), fused.down, fused
        pres = [Site(fused.both, "output", part) for part in (slice(0, 16), slice(16, 32))]
    else:
        sides, down, whole, pres = (model.gate(x), model.up(x)), model.down, model, []
        pres += [model.gate, model.up]
        with pytest.raises(MeasurementError, match="only more samples than inputs show that"):
            nerve.measure(model, [x[:6]], ffns=[FFNAdapter(0, "ffn", model.gate, model.down)])
    for pre, side in zip(pres, sides, strict=True):
        ffns = [FFNAdapter(0, "ffn", pre, down)]
        (row,) = nerve.measure(whole, [x], ffns=ffns).to_dict("records")
        assert_measured(row, side, sides[0] * sides[1])


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1, 30])
@pytest.mark.parametrize(
    "act", [nn.SiLU(), nn.GELU(), nn.LeakyReLU(), nn.PReLU(9), nn.Identity(), nn.Tanh(), nn.ReLU()]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_nonlinearity_is_mistaken_for_a_factor_at_any_scale(act, scale, dtype):
    """However nearly linear it is."""
    for projections in (
        (nn.Linear(6, 9), nn.Linear(9, 6)),
        (nn.Conv2d(6, 9, 1), nn.Conv2d(9, 6, 1)),
    ):
        model = Plain(*projections)
        model.act = act
        with torch.no_grad():
            if isinstance(act, nn.PReLU):
                act.weight.copy_(torch.linspace(-1, 1, 9))
            model.up.bias.zero_()
            model.up.weight.mul_(scale)
        x = torch.randn(20, 6) if isinstance(model.up, nn.Linear) else torch.randn(5, 6, 4, 4)
        model = model.to(dtype)
        ffns = [FFNAdapter(0, "ffn", model.up, model.down)]
        assert nerve.measure(model, [x.to(dtype)], ffns=ffns).status.item() == "ok"


def test_a_factor_with_few_samples_is_not_mistaken_for_the_gate():
    """It is checked until there are enough samples: with two, the slope of a ReLU looks like a
    factor."""
    torch.manual_seed(0)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.gate(x)) * self.up(x))

    model = Gated().double()
    ffns = [FFNAdapter(0, "ffn", model.up, model.down)]
    x = torch.randn(200, 4, dtype=torch.float64)
    with torch.no_grad():
        few = x[(model.up(x) > 0).all(1)][:1]
    with pytest.raises(MeasurementError, match="Give the gate"):
        nerve.measure(model, [few, x], ffns=ffns)
