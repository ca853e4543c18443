"""`nerve.measure` agrees with float64 NumPy on features taken by hand, and does not change the
model."""

import contextlib
import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import nerve
from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFNAdapter, sample_of
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.spectra import covariance


class Model(nn.Module):
    def __init__(self, d_model: int = 6, d_ff: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))

    def ffns(self) -> list[FFNAdapter]:
        return [FFNAdapter(0, "ffn", self.up, self.down)]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def oracle(features: np.ndarray) -> dict[str, float]:
    """The definitions, in float64 NumPy."""
    spectrum = np.sort(np.linalg.eigvalsh(np.cov(features.astype(np.float64).T)))[::-1].clip(0)
    p = spectrum / spectrum.sum()
    d = len(p)
    return {
        "se": -sum(x * math.log(x) for x in p if x > 0),
        "pr": 1 / np.square(p).sum(),
        "eee": 2 / d * (np.cumsum(p) - np.arange(1, d + 1) / d).sum(),
        "variance": spectrum.sum(),
    }


@pytest.mark.parametrize("shortcut", [True, False])
def test_each_ffn_has_one_row_with_the_values_of_float64_numpy(model, shortcut):
    batches = [torch.randn(4, 25, 6), torch.randn(7, 6)]
    rows = nerve.measure(model, batches, ffns=model.ffns(), shortcut=shortcut)
    x = torch.cat([batch.flatten(0, -2) for batch in batches])
    pre = (x @ model.up.weight.T + model.up.bias).detach()
    row = rows.iloc[0]
    assert len(rows) == 1
    assert (row.layer, row.ffn, row.n_samples, row.d_ff, row.d_in) == (0, "ffn", 107, 16, 6)
    assert row.status == "ok"
    for site, features in (("pre", pre), ("post", torch.relu(pre))):
        for name, value in oracle(features.numpy()).items():
            # Without the shortcut, float32 products put 1e-8 where a rank-deficient spectrum has 0.
            rel = 1e-5 if site == "pre" and not shortcut else 1e-6
            assert row[f"{name}_{site}"] == pytest.approx(value, rel=rel)
        pr = row[f"pr_{site}"]
        assert row[f"pr_{site}_corrected"] == pytest.approx(1 / (1 / pr - 1 / 107))


def test_the_precision_is_that_of_the_coarser_side(monkeypatch):
    """As on a GPU: bfloat16 before the nonlinearity; after it, the mean is too large for that."""
    monkeypatch.setattr(covariance, "default_product", lambda dtype, device: "bfloat16")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Sigmoid(), nn.Linear(16, 6)).bfloat16()
    ffns = [FFNAdapter(0, "ffn", model[0], model[2])]
    x = torch.randn(200, 6, dtype=torch.bfloat16)
    taken = [covariance.StreamingCovariance(16) for _ in range(2)]
    with torch.no_grad():
        taken[0].update(model[0](x))
        taken[1].update(model[:2](x))
    assert [each.precision for each in taken] == ["bfloat16", "float16x2"]
    assert nerve.measure(model, [x], ffns=ffns, shortcut=False).precision.tolist() == ["bfloat16"]


def test_the_division_into_batches_does_not_matter(model):
    x = torch.randn(120, 6)
    whole = nerve.measure(model, [x], ffns=model.ffns())
    parts = nerve.measure(model, x.split([1, 50, 69]), ffns=model.ffns())
    numbers = whole.select_dtypes("number").columns
    np.testing.assert_allclose(parts[numbers], whole[numbers], rtol=1e-6)


def test_a_dead_layer_has_a_status_instead_of_metrics(model):
    with torch.no_grad():
        model.up.bias.fill_(-1e6)
    row = nerve.measure(model, [torch.randn(50, 6)], ffns=model.ffns()).iloc[0]
    assert row.status == "zero_variance_post"
    assert row.pr_pre > 1
    assert pd.isna([row.se_post, row.pr_post, row.eee_post, row.js, row.pr_post_corrected]).all()


@pytest.mark.parametrize(
    ("batch", "status"),
    [
        (torch.full((50, 6), float("nan")), "non_finite"),
        (torch.ones(50, 6), "zero_variance"),
        (torch.ones(1, 6), "too_few_samples"),
    ],
)
def test_unmeasurable_values_are_null_with_a_status(model, batch, status):
    row = nerve.measure(model, [batch], ffns=model.ffns()).iloc[0]
    assert row.status == status
    assert pd.isna(
        row[["se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js"]]
    ).all()


def test_the_model_is_unchanged(model):
    model.train()
    model.down.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    nerve.measure(model, [torch.ones(3, 6)], ffns=model.ffns())
    assert (model.training, model.up.training, model.down.training) == (True, True, False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.up._forward_hooks


def test_hooks_are_removed_after_an_error(model):
    with pytest.raises(RuntimeError):
        nerve.measure(model, [torch.ones(3, 5)], ffns=model.ffns())
    assert not model.up._forward_hooks


def test_mappings_are_keyword_arguments_and_forward_handles_other_batches(model):
    x = torch.randn(40, 6)
    by_name = nerve.measure(model, [{"x": x}], ffns=model.ffns())
    by_hand = nerve.measure(
        model, [(x, "label")], ffns=model.ffns(), forward=lambda m, batch: m(batch[0])
    )
    pd.testing.assert_frame_equal(by_name, by_hand)


def test_no_batches_raise(model):
    with pytest.raises(MeasurementError, match="at least one forward pass"):
        nerve.measure(model, [], ffns=model.ffns())


def test_pre_and_post_of_different_samples_raise(model):
    model.down = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 4)), nn.Linear(4, 6))
    ffns = [FFNAdapter(0, "ffn", model.up, model.down[2])]
    with pytest.raises(MeasurementError, match="same samples and width"):
        nerve.measure(model, [torch.randn(9, 6)], ffns=ffns)


def test_modules_in_the_wrong_order_raise(model):
    with pytest.raises(
        MeasurementError, match="Post must be computed after pre; for ffn in layer 0"
    ):
        nerve.measure(model, [torch.randn(9, 6)], ffns=[FFNAdapter(0, "ffn", model.up, model.up)])


def test_a_nonlinearity_that_overwrites_its_input_raises(model):
    """Pre is lost by the time post is known, and no number is better than a wrong one."""
    overwriting = nn.Sequential(model.up, nn.ReLU(inplace=True), model.down)
    with pytest.raises(MeasurementError, match=r"overwrites it\. Use one with inplace=False"):
        nerve.measure(overwriting, [torch.randn(9, 6)], ffns=model.ffns())


def test_an_overwritten_input_is_noticed_in_any_sample():
    """The first sample may have no value that the nonlinearity changes."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 6))
    x = torch.randn(64, 6)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(16, 6).abs() + 0.1)
        model[0].bias.zero_()
    x[0] = 1.0
    assert (model[0](x[:1]) > 0).all()
    ffns = [FFNAdapter(0, "ffn", model[0], model[2])]
    with pytest.raises(MeasurementError, match="overwrites it"):
        nerve.measure(model, [x], ffns=ffns, shortcut=False)


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("is_trained", [True, False])
def test_pre_that_is_modified_at_one_position_raises(model, is_trained, shortcut):
    """For example by steering; few samples are compared, and none at this position."""

    def steer(module, args):
        args[0][3] += 1.0

    act = nn.ReLU()
    act.register_forward_pre_hook(steer)
    steered = nn.Sequential(model.up, act, model.down)
    ffns, x = model.ffns(), torch.randn(80, 6)
    assert torch.equal(sample_of(x), x[::10])
    with pytest.raises(MeasurementError, match="or the model before it, overwrites it"):
        measured(steered, x, ffns, shortcut, is_trained=is_trained)


def measured(model, x, ffns, shortcut, *, is_trained):
    """The eigenproblems of a pass with gradients, or without."""
    probe = Probe(ffns)
    probe.install()
    measurement = Measurement(probe, shortcut=shortcut)
    measurement.start()
    with torch.set_grad_enabled(is_trained):
        model(x)
    measurement.finish_forward()
    measurement.stop()
    return measurement.spectra()


def test_batches_without_samples_measure_nothing(model):
    """A status says so, as for a single sample."""
    (row,) = nerve.measure(model, [torch.zeros(0, 6)], ffns=model.ffns()).to_dict("records")
    assert (row["n_samples"], row["status"]) == (0, "too_few_samples")


def adapted(up: nn.Linear, change: torch.Tensor) -> None:
    """Replaces a module's forward, as libraries of adapters do."""
    inner = up.forward
    up.forward = lambda x: inner(x) + x @ change


def steered(up: nn.Linear, change: torch.Tensor) -> None:
    up.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ change)


@pytest.mark.parametrize("alter", [adapted, steered])
def test_changes_of_the_output_of_up_are_measured(model, alter):
    """The shortcut knows only the weight, so it must not be taken."""
    x = torch.randn(200, 6)
    plain = nerve.measure(model, [x], ffns=model.ffns())
    alter(model.up, 5 * torch.randn(6, model.up.out_features))
    altered = nerve.measure(model, [x], ffns=model.ffns())
    features = nerve.measure(model, [x], ffns=model.ffns(), shortcut=False)
    pd.testing.assert_frame_equal(altered, features)
    assert altered["variance_pre"].item() > 2 * plain["variance_pre"].item()


class Parametrized(Model):
    def __init__(self, constrain) -> None:
        super().__init__()
        constrain(self.up)


@pytest.mark.parametrize("constrain", [lambda m: m, weight_norm, spectral_norm])
def test_the_shortcut_agrees_with_the_features(constrain):
    """C_pre = W C_x Wᵀ to 1e-9 in float64, for any parametrization of the weight."""
    model = Parametrized(constrain).double()
    x = torch.randn(200, 6, dtype=torch.float64) + 3
    short = nerve.measure(model, [x], ffns=model.ffns())
    long = nerve.measure(model, [x], ffns=model.ffns(), shortcut=False)
    numbers = long.select_dtypes("number").columns
    np.testing.assert_allclose(short[numbers], long[numbers], rtol=1e-9)


def test_a_weight_that_changes_with_each_access_is_not_read_again():
    """In training, spectral norm iterates at each access: one iteration for one forward pass."""
    model = Parametrized(spectral_norm).train()
    x = torch.randn(50, 6)
    watched, alone = copy.deepcopy(model), model
    probe = Probe(watched.ffns())
    probe.install()
    measurement = Measurement(probe)
    measurement.start()
    for _ in range(3):
        torch.testing.assert_close(watched(x), alone(x), rtol=0, atol=0)
        measurement.finish_forward()
    probe.remove()
    assert all(torch.equal(a, b) for a, b in zip(watched.buffers(), alone.buffers(), strict=True))


def test_the_weight_is_that_of_the_forward_pass(model):
    """An optimizer may step between the forward pass and the solution."""
    x = torch.randn(50, 6)
    expected = nerve.measure(model, [x], ffns=model.ffns())
    probe = Probe(model.ffns())
    probe.install()
    measurement = Measurement(probe)
    measurement.start()
    model(x)
    measurement.finish_forward()
    probe.remove()
    with torch.no_grad():
        model.up.weight.zero_()
    assert measurement.spectra()[0].row()["pr_pre"] == expected.pr_pre[0]


def test_rounding_to_16_bits_is_measured(model):
    """Under autocast, the features are those that the nonlinearity receives: no shortcut is
    taken."""
    x = torch.randn(300, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = nerve.measure(model, [x], ffns=model.ffns()).iloc[0]
        features = model.up(x).detach()
    assert features.dtype == torch.bfloat16
    value = oracle(features.double().numpy())
    assert row.se_pre == pytest.approx(value["se"], abs=1e-5)
    assert row.pr_pre == pytest.approx(value["pr"], rel=1e-5)


def shares_by_hand(features: np.ndarray, n_positions: int) -> dict[str, float]:
    centered = features - features.mean(0)
    squares = np.square(centered).sum(1)
    position = squares.reshape(-1, n_positions).mean(0).max() / squares.mean()
    squares = np.sort(squares)[::-1]
    n_top = math.ceil(len(features) / 1000)
    return {
        "mean_share": len(features) * np.square(features.mean(0)).sum() / np.square(features).sum(),
        "largest_share": squares[0] / squares.sum(),
        "top_share": squares[:n_top].sum() / squares.sum(),
        "position_ratio": position,
    }


def outside_by_hand(weight: np.ndarray, features: np.ndarray) -> float:
    centered = features - features.mean(0)
    basis, _ = np.linalg.qr(weight)
    return 1 - np.square(centered @ basis).sum() / np.square(centered).sum()


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize(("n_sequences", "n_tokens"), [(2, 6), (2, 300), (10, 60)])
@pytest.mark.parametrize("skip_first", [0, 1, 4])
def test_shares_are_those_of_the_features_that_count(
    model, shortcut, n_sequences, n_tokens, skip_first
):
    """With fewer samples than features, and with more; of positions with at least 8 sequences."""
    batches = list(torch.randn(n_sequences, n_tokens, 6).split(n_sequences // 2))
    batches = [batch * torch.linspace(9, 1, n_tokens)[:, None] for batch in batches]
    rows = nerve.measure(
        model, batches, ffns=model.ffns(), shortcut=shortcut, skip_first=skip_first
    )
    (row,) = rows.to_dict("records")
    x = torch.cat(batches)[:, skip_first:].reshape(-1, 6).double()
    pre = (x @ model.up.weight.double().T + model.up.bias.double()).detach().numpy()
    post = pre.clip(0)
    assert row["n_samples"] == len(x)
    assert row["pr_post"] == pytest.approx(oracle(post)["pr"], rel=1e-5)
    for site, features in (("pre", pre), ("post", post)):
        for name, value in shares_by_hand(features, n_tokens - skip_first).items():
            value = math.nan if name == "position_ratio" and n_sequences < 8 else value
            assert row[f"{name}_{site}"] == pytest.approx(value, rel=1e-5, nan_ok=True)
    weight = model.up.weight.detach().double().numpy()
    assert row["variance_outside"] == pytest.approx(outside_by_hand(weight, post), rel=1e-5)


def test_neither_skipped_positions_nor_padding_count(model):
    x, mask = torch.randn(3, 20, 6), torch.rand(3, 20) > 0.4
    ffns, both = model.ffns(), (torch.arange(20) >= 2) & mask
    got = nerve.measure(model, [x], ffns=ffns, mask=lambda _: mask, skip_first=2)
    want = nerve.measure(model, [x], ffns=ffns, mask=lambda _: both)
    assert got.n_samples.item() == both.sum()
    pd.testing.assert_frame_equal(got, want)


@pytest.mark.parametrize("skip_first", [-1, 1.0, True, "2"])
def test_an_invalid_number_of_skipped_positions_raises(model, skip_first):
    with pytest.raises(MeasurementError, match="skip_first must be a number of positions"):
        nerve.measure(model, [torch.ones(1, 3, 6)], ffns=model.ffns(), skip_first=skip_first)


def test_skipping_positions_of_features_without_sequences_raises(model):
    with pytest.raises(MeasurementError, match=r"\[\.\.\., sequence, width\]; got \(30, 6\)"):
        nerve.measure(model, [torch.ones(30, 6)], ffns=model.ffns(), skip_first=1)


class Linear(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


@pytest.mark.parametrize("shortcut", [True, False])
def test_an_identity_leaves_all_variance_in_the_span_of_pre(shortcut):
    linear = Linear()
    row = nerve.measure(linear, [torch.randn(90, 6)], ffns=linear.ffns(), shortcut=shortcut).iloc[0]
    assert row.variance_outside == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_under_autocast_the_span_is_that_of_the_rounded_weight(device):
    """With the identity in bfloat16, only the rounding of pre itself lies outside: at most 2**-18.
    With the stored weight, the rounding of the weight would, too."""
    torch.manual_seed(0)
    linear, x = Linear(16, 64).to(device), torch.randn(500, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        row = nerve.measure(linear, [x], ffns=linear.ffns()).iloc[0]
        pre = linear.up(x).detach().cpu().double().numpy()
    weight = linear.up.weight.detach().cpu()
    rounded = outside_by_hand(weight.bfloat16().double().numpy(), pre)
    stored = outside_by_hand(weight.double().numpy(), pre)
    # On a GPU products of bfloat16 are exact to 1e-6 of the variance.
    assert row.variance_outside == pytest.approx(rounded, abs=1e-7 if device == "cpu" else 1e-6)
    assert rounded < stored < 2**-14


def no_weight(model: Model) -> None:
    model.up = nn.Sequential(model.up)


def wide_input(model: Model) -> None:
    model.up = nn.Linear(6, 6)
    model.down = nn.Linear(6, 6)


def altered(model: Model) -> None:
    model.up.register_forward_hook(lambda module, inputs, output: output + 1)


@pytest.mark.parametrize("change", [no_weight, wide_input, altered])
def test_without_a_readable_weight_variance_outside_is_null(model, change):
    change(model)
    row = nerve.measure(model, [torch.randn(50, 6)], ffns=model.ffns()).iloc[0]
    assert row.status == "ok"
    assert math.isnan(row.variance_outside)


class Recorded(Model):
    """Keeps pre as its nonlinearity receives it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pre = self.up(x)
        self.seen.append(pre.clone())
        return self.down(torch.relu(self.between(pre, x)))

    def between(self, pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return pre


class NewWeight(Recorded):
    """Has another weight from the second batch on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seen:
            self.up.weight.copy_(self.up.weight.flip(0) * torch.linspace(0, 3, 6))
        return super().forward(x)


class LateHook(Recorded):
    """Has a hook from the second batch on, which runs before the probe's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.seen) == 1:
            self.up.register_forward_hook(lambda m, i, o: o.square(), prepend=True)
        return super().forward(x)


class Overwritten(Recorded):
    """Has another weight once post has been computed."""

    def between(self, pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.up.weight.mul_(torch.linspace(0, 3, 6))
        return pre


class OverwrittenInput(Recorded):
    def between(self, pre: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        x.mul_(torch.linspace(0, 3, 6))
        return pre


class Mode(torch.overrides.TorchFunctionMode):
    """Computes another linear layer than its module declares."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.square() if func is nn.functional.linear and out.shape[-1] == 16 else out


def global_hook(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
    return output.square() if output.shape[-1] == 16 else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case", [NewWeight, LateHook, Overwritten, OverwrittenInput, "global hook", "mode"]
)
def test_pre_that_its_weight_does_not_explain_is_measured_itself(case, dtype):
    """The spectrum is that of the features, and variance_outside is null."""
    torch.manual_seed(1)
    model = (Recorded if isinstance(case, str) else case)().to(dtype)
    batches = [torch.randn(60, 6).to(dtype) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        if case == "global hook":
            handle = nn.modules.module.register_module_forward_hook(global_hook)
            stack.callback(handle.remove)
        if case == "mode":
            stack.enter_context(Mode())
        (row,) = nerve.measure(model, batches, ffns=model.ffns()).to_dict("records")
    expected = oracle(torch.cat(model.seen).detach().double().numpy())
    assert row["pr_pre"] == pytest.approx(expected["pr"], rel=1e-5)
    assert row["variance_pre"] == pytest.approx(expected["variance"], rel=1e-5)
    assert math.isnan(row["variance_outside"])


def test_the_covariance_of_the_input_is_converted_exactly():
    torch.manual_seed(0)
    weight, bias = torch.randn(9, 4).double(), torch.randn(9).double()
    x = torch.randn(70, 4, dtype=torch.float64) + 5
    of_input, of_output = covariance.StreamingCovariance(4), covariance.StreamingCovariance(9)
    of_input.update(x)
    of_output.update(x @ weight.T + bias)
    got = of_input.projected(weight, bias)
    torch.testing.assert_close(got.covariance(), of_output.covariance(), rtol=1e-12, atol=1e-12)
    for each in (got, of_output):  # and goes on
        each.update(x @ weight.T * 3)
    torch.testing.assert_close(got.covariance(), of_output.covariance(), rtol=1e-12, atol=1e-12)


def test_a_layer_that_collapses_to_one_vector_has_a_large_share_of_the_mean(model):
    with torch.no_grad():
        model.up.weight.zero_()
    row = nerve.measure(model, [torch.randn(50, 6)], ffns=model.ffns()).iloc[0]
    assert row.status == "zero_variance"
    assert (row.mean_share_pre, row.mean_share_post) == (1, 1)
    assert pd.isna(row[["largest_share_pre", "top_share_post", "variance_outside"]]).all()


def test_a_token_that_dominates_the_spectrum_is_reported(model):
    x = torch.randn(8, 200, 6)
    assert nerve.measure(model, [x], ffns=model.ffns()).outliers.tolist() == [""]
    x[3, 77] *= 1000
    row = nerve.measure(model, [x], ffns=model.ffns()).iloc[0]
    assert row.outliers == "pre, post"
    assert row.pr_post < 1.1
