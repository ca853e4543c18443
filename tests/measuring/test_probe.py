"""The probe finds FFNs, and taps all of the features that a computation by hand gives, once."""

import gc

import pandas as pd
import pytest
import torch
from by_hand import Plain
from torch import nn

import nerve
from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFNAdapter
from nerve.measuring.find import find_ffns
from nerve.measuring.probe import Probe
from nerve.models import build_model

VALUES = {
    "model": {"kind": "gpt", "n_layers": 2, "d_model": 16, "n_heads": 2, "seq_len": 8},
    "normalization": {},
    "activation": {"name": "gelu"},
    "position": {"name": "learned"},
    "ffn": {"width": 4},
}


class Foreign(nn.Module):
    """An FFN that does not implement the protocol."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.fc, self.proj, self.times = nn.Linear(4, 8), nn.Linear(8, 4), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = self.proj(torch.relu(self.fc(x)))
        return x


def tap(model: nn.Module, x: torch.Tensor, ffns=None):
    taken: dict = {}
    probe = Probe(find_ffns(model) if ffns is None else ffns)
    probe.install()

    def receive(index, *features):
        for site, tensor in zip(("input", "pre", "post"), features, strict=True):
            taken[index, site] = tensor.clone()

    probe.start(receive)
    try:
        model(x)
        probe.finish_forward()
    finally:
        probe.remove()
    return taken


@pytest.mark.parametrize("gated", [False, True])
def test_features_equal_those_computed_by_hand(gated):
    """Pre is W_up x + b (gated: W_gate x + b); post is act(pre) (gated: times W_up x + b)."""
    model = build_model(
        {**VALUES, "ffn": {"width": 4, "gated": gated}}, seed=0, vocab_size=11
    ).eval()
    tokens = torch.arange(16).reshape(2, 8) % 11
    taken = tap(model, tokens)
    with torch.no_grad():
        x = model.embedding(tokens) + model.position(torch.zeros(2, 8, 16))
        for layer, block in enumerate(model.blocks):
            x = x + block.attention(block.attention_norm(x))
            inputs = block.ffn_norm(x)
            ffn = block.ffn
            up = inputs @ ffn.up.weight.T + ffn.up.bias
            pre = inputs @ ffn.gate.weight.T + ffn.gate.bias if gated else up
            post = nn.functional.gelu(pre) * (up if gated else 1)
            torch.testing.assert_close(taken[layer, "input"], inputs)
            torch.testing.assert_close(taken[layer, "pre"], pre)
            torch.testing.assert_close(taken[layer, "post"], post)
            x = x + post @ ffn.down.weight.T + ffn.down.bias


def test_ffns_are_found_in_order_of_layers():
    ffns = find_ffns(build_model(VALUES, seed=0, vocab_size=11))
    assert [(ffn.layer, ffn.name) for ffn in ffns] == [(0, "ffn"), (1, "ffn")]


def test_an_adapter_describes_a_foreign_model():
    model = Foreign()
    x = torch.randn(3, 4)
    taken = tap(model, x, [FFNAdapter(0, "ffn", model.fc, model.proj)])
    torch.testing.assert_close(taken[0, "pre"], model.fc(x))
    torch.testing.assert_close(taken[0, "post"], torch.relu(model.fc(x)))


def test_a_model_without_ffns_raises():
    with pytest.raises(MeasurementError, match="No FFN was found in a forward pass of Linear"):
        find_ffns(nn.Linear(2, 2))


def test_two_ffns_with_the_same_name_and_layer_raise():
    model = build_model(VALUES, seed=0, vocab_size=11)
    model.blocks[1].ffn.layer = 0
    with pytest.raises(MeasurementError, match="is used more than once"):
        Probe(find_ffns(model))


def test_an_empty_list_of_ffns_raises():
    """Otherwise a filter that matches nothing would train and measure nothing."""
    with pytest.raises(MeasurementError, match="at least one FFN; got an empty list"):
        Probe([])


@pytest.mark.parametrize("times", [0, 2])
def test_missing_and_doubled_features_raise(times):
    model = Foreign(times)
    with pytest.raises(MeasurementError, match=f"n_runs=1 per .* it ran {times} times"):
        tap(model, torch.randn(3, 4), [FFNAdapter(0, "ffn", model.fc, model.proj)])


def test_features_that_are_not_a_floating_point_tensor_raise():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    pair = Pair(4, 8)
    model = nn.Sequential(pair)
    with pytest.raises(MeasurementError, match="is tuple"):
        tap(model, torch.randn(3, 4), [FFNAdapter(0, "ffn", pair, nn.Identity())])


def test_a_removed_probe_leaves_no_hook():
    model = Foreign()
    tap(model, torch.randn(3, 4), [FFNAdapter(0, "ffn", model.fc, model.proj)])
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_in_inference_mode_post_must_depend_on_pre_too():
    """Inference mode is left for the forward passes that need it, and restored afterwards in any
    case."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Plain(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2))
    model = nn.Sequential(*blocks)
    x = torch.randn(100, 4)
    right = FFNAdapter(0, "ffn", blocks[0].up, blocks[0].down)
    wrong = FFNAdapter(0, "ffn", blocks[0].up, blocks[1].down)
    probe = Probe([right])
    probe.install()
    modes = []
    blocks[0].act.register_forward_hook(
        lambda *how: modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    with torch.inference_mode():
        for _ in range(2):
            probe.start(lambda *how: None)
            given = model(x)
            probe.finish_forward()
            assert torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
    assert modes == [(False, True), (True, False)]
    assert not given.requires_grad
    probe.remove()
    probe = Probe([wrong])
    probe.install()
    with torch.inference_mode():
        probe.start(lambda *how: None)
        with pytest.raises(MeasurementError, match="through a matrix"):
            model(x)
    probe.remove()
    assert (torch.is_inference_mode_enabled(), torch.is_grad_enabled()) == (False, True)
    del probe
    gc.collect()
    assert not torch.is_inference_mode_enabled()


def test_inference_mode_does_not_change_the_measurement():
    torch.manual_seed(0)
    model = Plain(nn.Linear(4, 8), nn.Linear(8, 4))
    x = torch.randn(100, 4)
    expected = nerve.measure(model, [x])
    with torch.inference_mode():
        rows = nerve.measure(model, [x])
        assert torch.is_inference_mode_enabled()
    pd.testing.assert_frame_equal(rows, expected)


def test_a_model_created_in_inference_mode_is_measured_if_its_ffns_are_described():
    """Its weights take part in no graph, so nothing shows which features depend on which."""
    torch.manual_seed(0)
    model = Plain(nn.Linear(4, 8), nn.Linear(8, 4))
    x = torch.randn(100, 4)
    expected = nerve.measure(model, [x])
    with torch.inference_mode():
        torch.manual_seed(0)
        inside = Plain(nn.Linear(4, 8), nn.Linear(8, 4))
    with pytest.raises(MeasurementError, match="describe the FFNs with"):
        nerve.measure(inside, [x])
    assert inside.training
    rows = nerve.measure(inside, [x], ffns=[nerve.FFNAdapter(0, "ffn", inside.up, inside.down)])
    pd.testing.assert_frame_equal(rows, expected)
