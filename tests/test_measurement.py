"""`nerve.measure` equals float64 NumPy on features taken by hand, and leaves the model as it was."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import nerve
from nerve.errors import MeasurementError
from nerve.probe import FFNAdapter


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


def test_one_row_an_ffn_with_the_values_of_float64_numpy(model):
    batches = [torch.randn(4, 25, 6), torch.randn(7, 6)]
    rows = nerve.measure(model, batches, ffns=model.ffns())
    x = torch.cat([batch.flatten(0, -2) for batch in batches])
    pre = (x @ model.up.weight.T + model.up.bias).detach()
    row = rows.iloc[0]
    assert len(rows) == 1
    assert (row.layer, row.ffn, row.n_samples, row.d_ff, row.d_in) == (0, "ffn", 107, 16, 6)
    assert row.status == "ok"
    for site, features in (("pre", pre), ("post", torch.relu(pre))):
        for name, value in oracle(features.numpy()).items():
            assert row[f"{name}_{site}"] == pytest.approx(value, rel=1e-6)
        pr = row[f"pr_{site}"]
        assert row[f"pr_{site}_corrected"] == pytest.approx(1 / (1 / pr - 1 / 107))


def test_how_tokens_fall_into_batches_does_not_matter(model):
    x = torch.randn(120, 6)
    whole = nerve.measure(model, [x], ffns=model.ffns())
    parts = nerve.measure(model, x.split([1, 50, 69]), ffns=model.ffns())
    numbers = whole.select_dtypes("number").columns
    np.testing.assert_allclose(parts[numbers], whole[numbers], rtol=1e-9)


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
    assert pd.isna(row[["se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js"]]).all()


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
    with pytest.raises(MeasurementError, match="same samples and width"):
        nerve.measure(model, [torch.randn(9, 6)], ffns=[FFNAdapter(0, "ffn", model.up, model.up)])
