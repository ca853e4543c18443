"""`nerve.measure` equals float64 NumPy on features taken by hand, and changes no model."""

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
from nerve.measurement import Measurement
from nerve.probe import FFNAdapter, Probe
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
    """Definitions of the design, in float64 NumPy."""
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
def test_one_row_an_ffn_with_the_values_of_float64_numpy(model, shortcut):
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
    """As on a GPU: bfloat16 before the nonlinearity; after it the mean is too large for that."""
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


def test_how_tokens_fall_into_batches_does_not_matter(model):
    x = torch.randn(120, 6)
    whole = nerve.measure(model, [x], ffns=model.ffns())
    parts = nerve.measure(model, x.split([1, 50, 69]), ffns=model.ffns())
    numbers = whole.select_dtypes("number").columns
    np.testing.assert_allclose(parts[numbers], whole[numbers], rtol=1e-6)


def test_a_dead_layer_has_no_metrics_after_it_and_says_so(model):
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
def test_what_cannot_be_measured_is_null_with_a_reason(model, batch, status):
    row = nerve.measure(model, [batch], ffns=model.ffns()).iloc[0]
    assert row.status == status
    assert pd.isna(
        row[["se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js"]]
    ).all()


def test_the_model_is_left_as_it_was(model):
    model.train()
    model.down.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    nerve.measure(model, [torch.ones(3, 6)], ffns=model.ffns())
    assert (model.training, model.up.training, model.down.training) == (True, True, False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.up._forward_hooks


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(RuntimeError):
        nerve.measure(model, [torch.ones(3, 5)], ffns=model.ffns())
    assert not model.up._forward_hooks


def test_mappings_are_arguments_and_forward_runs_anything_else(model):
    x = torch.randn(40, 6)
    by_name = nerve.measure(model, [{"x": x}], ffns=model.ffns())
    by_hand = nerve.measure(
        model, [(x, "label")], ffns=model.ffns(), forward=lambda m, batch: m(batch[0])
    )
    pd.testing.assert_frame_equal(by_name, by_hand)


def test_no_batches_are_refused(model):
    with pytest.raises(MeasurementError, match="at least one forward pass"):
        nerve.measure(model, [], ffns=model.ffns())


def test_features_of_other_samples_are_refused(model):
    model.down = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 4)), nn.Linear(4, 6))
    ffns = [FFNAdapter(0, "ffn", model.up, model.down[2])]
    with pytest.raises(MeasurementError, match="same samples and width"):
        nerve.measure(model, [torch.randn(9, 6)], ffns=ffns)


def test_modules_in_the_wrong_order_are_refused(model):
    with pytest.raises(MeasurementError, match="Post must follow pre; of ffn in layer 0"):
        nerve.measure(model, [torch.randn(9, 6)], ffns=[FFNAdapter(0, "ffn", model.up, model.up)])


def test_a_nonlinearity_that_overwrites_its_input_is_refused(model):
    """What pre was is gone when both sides are taken; better no number than a wrong one."""
    overwriting = nn.Sequential(model.up, nn.ReLU(inplace=True), model.down)
    with pytest.raises(MeasurementError, match=r"overwrites it\. Use one with inplace=False"):
        nerve.measure(overwriting, [torch.randn(9, 6)], ffns=model.ffns())


def test_an_overwritten_input_shows_in_any_sample():
    """The first one may have no value that the nonlinearity changes."""
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


def test_batches_without_samples_measure_nothing(model):
    """A status says so, as for one sample."""
    (row,) = nerve.measure(model, [torch.zeros(0, 6)], ffns=model.ffns()).to_dict("records")
    assert (row["n_samples"], row["status"]) == (0, "too_few_samples")


def adapted(up: nn.Linear, change: torch.Tensor) -> None:
    """As libraries of adapters do that replace a module's forward."""
    inner = up.forward
    up.forward = lambda x: inner(x) + x @ change


def steered(up: nn.Linear, change: torch.Tensor) -> None:
    up.register_forward_hook(lambda module, inputs, output: output + inputs[0] @ change)


@pytest.mark.parametrize("alter", [adapted, steered])
def test_what_alters_the_output_of_up_is_measured(model, alter):
    """The shortcut knows the weight alone, and must not be taken then."""
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
def test_the_shortcut_gives_what_the_features_give(constrain):
    """C_pre = W C_x Wᵀ to 1e-9 in float64, whatever makes the weight."""
    model = Parametrized(constrain).double()
    x = torch.randn(200, 6, dtype=torch.float64) + 3
    short = nerve.measure(model, [x], ffns=model.ffns())
    long = nerve.measure(model, [x], ffns=model.ffns(), shortcut=False)
    numbers = long.select_dtypes("number").columns
    np.testing.assert_allclose(short[numbers], long[numbers], rtol=1e-9)


def test_a_weight_that_changes_when_it_is_read_is_not_read_again():
    """In training spectral norm iterates at each reading: one iteration for one forward pass."""
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


def test_rounding_to_16_bits_is_measured_not_left_out(model):
    """Under autocast the features are those that the nonlinearity gets: no shortcut."""
    x = torch.randn(300, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = nerve.measure(model, [x], ffns=model.ffns()).iloc[0]
        features = model.up(x).detach()
    assert features.dtype == torch.bfloat16
    value = oracle(features.double().numpy())
    assert row.se_pre == pytest.approx(value["se"], abs=1e-5)
    assert row.pr_pre == pytest.approx(value["pr"], rel=1e-5)
