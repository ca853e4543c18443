"""Pre of 16-bit features from the FFN's input: its values, what it omits, where it is not used, and
errors."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrizations import weight_norm

import nerve
from nerve.errors import ConfigError, MeasurementError
from nerve.measuring.ffns import FFN, FFNAdapter, Site
from nerve.measuring.groups import Grouped
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe

HALF = [torch.bfloat16, torch.float16]
PRE = ["se_pre", "pr_pre", "eee_pre", "js", "variance_pre"]
OF_PRE = [
    *("pr_pre_corrected", "pr_pre_fraction", "exp_se_pre", "se_pre_normalized"),
    *("pr_gain", "delta_eee"),
]
"""What is derived from those."""


class Model(nn.Module):
    def __init__(self, d_in: int = 6, d_ff: int = 24) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(d_in, d_ff), nn.GELU(), nn.Linear(d_ff, d_in)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))

    def ffns(self) -> list[FFN]:
        return [FFNAdapter(0, "ffn", self.up, self.down)]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def row_of(
    model: nn.Module,
    batches: list[Tensor],
    ffns: list[FFN],
    shortcut: bool | str = "projected",
    dtype: torch.dtype = torch.bfloat16,
) -> pd.Series:
    """The first row, under autocast."""
    with torch.autocast(batches[0].device.type, dtype):
        return nerve.measure(model, batches, ffns=ffns, shortcut=shortcut).iloc[0]


def by_numpy(features: np.ndarray) -> dict[str, float]:
    """The metrics of pre, in float64, from the definitions."""
    spectrum = np.linalg.eigvalsh(np.cov(features.T))[::-1].clip(0)
    p, d = spectrum / spectrum.sum(), len(spectrum)
    return {
        "se_pre": -sum(x * math.log(x) for x in p if x > 0),
        "pr_pre": 1 / np.square(p).sum(),
        "eee_pre": 2 / d * (np.cumsum(p) - np.arange(1, d + 1) / d).sum(),
        "variance_pre": spectrum.sum(),
    }


def rounded(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    return tensor.detach().cpu().to(dtype).double().numpy()


@pytest.mark.parametrize("shortcut", ["projected", True])
@pytest.mark.parametrize("dtype", HALF)
def test_without_rounding_the_spectrum_is_the_closed_form(dtype, shortcut):
    """W has the columns 2^-k h_k with orthogonal signs h_k, and x the signs of a Hadamard matrix.
    So u is a sum of +-2^-k, with 8 digits, and its eigenvalues are 16 · 4^-k · N / (N - 1)."""
    hadamard = torch.ones(1, 1)
    for _ in range(6):
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    model = Model(8, 16)
    with torch.no_grad():
        model.up.weight.copy_(hadamard[:16, :8] * 2.0 ** -torch.arange(8))
        model.up.bias.zero_()
    probe = Probe(model.ffns())
    probe.install()
    measurement = Measurement(probe, shortcut=shortcut)
    measurement.start()
    with torch.autocast("cpu", dtype), torch.no_grad():
        model(hadamard[:, 1:9])
    measurement.finish_forward()
    probe.remove()
    (spectra,) = measurement.spectra()
    kind = str(dtype).removeprefix("torch.")
    assert spectra.precision == ("float32" if shortcut is True else f"projected_{kind}")
    expected = np.zeros(16)
    expected[:8] = 16 * 64 / 63 * 0.25 ** np.arange(8)
    np.testing.assert_allclose(spectra.pre, expected, rtol=1e-6, atol=1e-5 * (shortcut is True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", HALF)
def test_the_spectrum_is_that_of_the_rounded_weight_and_input(model, dtype, device):
    """Against float64 NumPy, with weight and input as autocast rounds them; unrounded they would
    give other numbers. Everything except the spectrum of pre is as without the projection."""
    x, model = torch.randn(5, 80, 6, device=device), model.to(device)
    projected, full = (row_of(model, [x], model.ffns(), how, dtype) for how in ("projected", True))
    w, inputs = rounded(model.up.weight, dtype), rounded(x.flatten(0, 1), dtype)
    oracle = by_numpy(inputs @ w.T)
    unrounded = by_numpy(
        rounded(x.flatten(0, 1), torch.float64) @ rounded(model.up.weight, torch.float64).T
    )
    for name, value in oracle.items():
        assert projected[name] == pytest.approx(value, rel=1e-9)
        assert projected[name] != pytest.approx(unrounded[name], rel=1e-6)
    same = projected.index.difference([*PRE, *OF_PRE, "precision"])
    pd.testing.assert_series_equal(projected[same], full[same])
    assert projected["precision"] == f"projected_{str(dtype).removeprefix('torch.')}"
    assert full["precision"] in (("float32",) if device == "cpu" else ("bfloat16", "float16x2"))
    assert projected["se_pre"] == pytest.approx(full["se_pre"], abs=1e-3)


def test_a_16_bit_model_gives_the_same_spectrum(model):
    x = torch.randn(400, 6)
    autocast = row_of(model, [x], model.ffns())
    halved = nerve.measure(
        model.bfloat16(), [x.bfloat16()], ffns=model.ffns(), shortcut="projected"
    ).iloc[0]
    assert halved["precision"] == "projected_bfloat16"
    np.testing.assert_allclose(
        halved[PRE[:3]].astype(float), autocast[PRE[:3]].astype(float), rtol=1e-9
    )


def test_with_32_bits_it_is_the_exact_shortcut(model):
    x = torch.randn(400, 6)
    rows = [
        nerve.measure(model, [x], ffns=model.ffns(), shortcut=how) for how in (True, "projected")
    ]
    pd.testing.assert_frame_equal(*rows)
    assert rows[0]["precision"].tolist() == ["float32"]  # that of post


def test_pre_that_is_no_wider_than_the_input_is_measured_itself(model):
    narrow, x = Model(8, 8), torch.randn(99, 8)
    rows = [row_of(narrow, [x], narrow.ffns(), how) for how in (True, "projected")]
    pd.testing.assert_series_equal(*rows)


def large_mean(model: Model, x: Tensor) -> Tensor:
    nn.init.constant_(model.up.bias, 20.0)
    return x


def nearly_constant(model: Model, x: Tensor) -> Tensor:
    nn.init.constant_(model.up.bias, 1.0)
    return 1e-6 * x


def overflowing(model: Model, x: Tensor) -> Tensor:
    return 5e4 * x.clamp(-1, 1) + 1e3


def vanishing(model: Model, x: Tensor) -> Tensor:
    nn.init.zeros_(model.up.bias)
    return 1e-6 * x


@pytest.mark.parametrize(
    ("plant", "dtype", "status"),
    [
        (large_mean, torch.bfloat16, "ok"),
        (nearly_constant, torch.bfloat16, "zero_variance"),
        (overflowing, torch.float16, "non_finite"),
        (vanishing, torch.float16, "ok"),
    ],
)
def test_pre_is_measured_itself_if_rounding_matters(model, plant, dtype, status):
    """The row, including its status, is that of the features."""
    x = plant(model, torch.randn(300, 6))
    rows = [row_of(model, [x], model.ffns(), how, dtype) for how in (True, "projected")]
    pd.testing.assert_series_equal(*rows)
    assert rows[0]["status"] == status


def test_earlier_projected_batches_are_merged(model):
    """W x + b of the first batch, and pre itself of the second, whose mean is large."""
    x, far = torch.randn(200, 6), torch.randn(150, 6)
    far[:, 0] += 100
    row = row_of(model, [x, far], model.ffns())
    with torch.autocast("cpu", torch.bfloat16):
        features = model.up(far)
    w, b = (rounded(each, torch.bfloat16) for each in (model.up.weight, model.up.bias))
    first = rounded(x, torch.bfloat16) @ w.T + b
    oracle = by_numpy(np.concatenate([first, rounded(features, torch.bfloat16)]))
    for name, value in oracle.items():
        assert row[name] == pytest.approx(value, rel=1e-5)
    assert row["precision"] == "projected_bfloat16"
    assert row["variance_outside"] == pytest.approx(
        row_of(model, [x, far], model.ffns(), True)["variance_outside"], rel=1e-6
    )


def groups_of(
    model: Model, batches: list[Tensor], shortcut: bool | str
) -> tuple[pd.DataFrame, pd.Series]:
    probe = Probe(model.ffns())
    probe.install()
    measurement = Measurement(probe, shortcut=shortcut, grouped=Grouped(("position", "halves")))
    measurement.start()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for x in batches:
            model(x)
            measurement.finish_forward()
    probe.remove()
    rows = pd.DataFrame([each.solve().row() for each in measurement.group_eigenproblems()])
    (spectra,) = measurement.spectra()
    return rows.set_index(["site", "grouping", "group"]), pd.Series(spectra.row())


def test_groups_are_projected_and_merged_into_all_samples(model):
    """Each agrees with its own features to 1e-3 nats; together they equal the result without
    groups."""
    x = torch.randn(40, 17, 6)
    groups, row = groups_of(model, [x], "projected")
    full, _ = groups_of(model, [x], True)
    assert groups.index.tolist() == full.index.tolist()
    assert len(groups.xs("pre")) == 8
    np.testing.assert_allclose(groups["se"], full["se"], atol=1e-3)
    np.testing.assert_allclose(groups["variance"], full["variance"], rtol=1e-3)
    assert not np.array_equal(groups.xs("pre")["se"], full.xs("pre")["se"])
    pd.testing.assert_frame_equal(groups.xs("post"), full.xs("post"))
    whole = row_of(model, [x], model.ffns())
    assert row["precision"] == whole["precision"] == "projected_bfloat16"
    np.testing.assert_allclose(row[PRE].astype(float), whole[PRE].astype(float), rtol=1e-6)


def test_pre_is_measured_itself_if_rounding_matters_in_one_group(model):
    """First tokens that are nearly one vector, as in trained models."""
    x = torch.randn(40, 17, 6)
    x[:, 0] = 8 + 0.05 * x[:, 0]
    assert row_of(model, [x], model.ffns())["precision"] == "projected_bfloat16"
    groups, row = groups_of(model, [x], "projected")
    full, full_row = groups_of(model, [x], True)
    pd.testing.assert_frame_equal(groups, full)
    pd.testing.assert_series_equal(row, full_row)


def test_projected_and_unprojected_groups_are_merged(model):
    x, far = torch.randn(2, 40, 17, 6)
    far[..., 0] += 100
    groups, row = groups_of(model, [x, far], "projected")
    full, full_row = groups_of(model, [x, far], True)
    assert row["precision"] == "projected_bfloat16"
    np.testing.assert_allclose(groups["se"], full["se"], atol=1e-4)
    assert not np.array_equal(groups.xs("pre")["se"], full.xs("pre")["se"])
    assert row["se_pre"] == pytest.approx(full_row["se_pre"], abs=1e-4)


def test_experts_and_their_pool_are_projected():
    """The pool against float64 NumPy over the samples of both."""
    torch.manual_seed(0)
    experts = [Model() for _ in range(2)]
    both = nn.ModuleList(experts)
    x = torch.randn(2, 150, 6)
    ffns: list[FFN] = [
        FFNAdapter(0, f"expert_{i}", each.up, each.down, n_runs=None, pool="experts")
        for i, each in enumerate(experts)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        rows = nerve.measure(
            both,
            [x],
            ffns=ffns,
            forward=lambda m, batch: [each(part) for each, part in zip(m, batch, strict=True)],
            shortcut="projected",
        )
    assert rows["ffn"].tolist() == ["expert_0", "expert_1", "experts"]
    assert (rows["precision"] == "projected_bfloat16").all()
    parts = [
        rounded(part, torch.bfloat16) @ rounded(each.up.weight, torch.bfloat16).T
        + rounded(each.up.bias, torch.bfloat16)
        for each, part in zip(experts, x, strict=True)
    ]
    for row, features in zip(rows.to_dict("records"), [*parts, np.concatenate(parts)], strict=True):
        for name, value in by_numpy(features).items():
            assert row[name] == pytest.approx(value, rel=1e-8)


def adapted(model: Model) -> list[FFN]:
    inner = model.up.forward
    model.up.forward = lambda x: inner(x) * 0.99
    return model.ffns()


def hooked(model: Model) -> list[FFN]:
    model.up.register_forward_hook(lambda module, args, output: 1.001 * output)
    return model.ffns()


def another_module(model: Model) -> list[FFN]:
    model.up = nn.Sequential(model.up)
    return model.ffns()


def input_of_the_activation(model: Model) -> list[FFN]:
    return [FFNAdapter(0, "ffn", Site(model.act, "input"), model.down)]


@pytest.mark.parametrize("alter", [adapted, hooked, another_module, input_of_the_activation])
def test_pre_that_is_not_affine_raises_and_is_measured_without_projection(model, alter: Callable):
    ffns, x = alter(model), torch.randn(100, 6)
    with pytest.raises(MeasurementError, match=r"single readable weight; that of ffn in la"):
        row_of(model, [x], ffns)
    assert row_of(model, [x], ffns, True)["status"] == "ok"


def test_a_change_of_pre_that_no_module_shows_raises():
    """A hook on all modules adds a twentieth: far less than the magnitudes of 1024 products, to
    which single values are compared."""
    torch.manual_seed(0)
    model = Model(1024, 2048)

    def add(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        return 1.05 * output if module is model.up else None

    handle = register_module_forward_hook(add)
    try:
        with pytest.raises(MeasurementError, match="single readable weight"):
            row_of(model, [torch.randn(50, 1024)], model.ffns())
    finally:
        handle.remove()


def test_a_parametrized_weight_in_training_raises(model):
    weight_norm(model.up)
    assert row_of(model, [torch.randn(99, 6)], model.ffns())["precision"] == "projected_bfloat16"
    probe = Probe(model.train().ffns())
    probe.install()
    measurement = Measurement(probe, shortcut="projected")
    measurement.start()
    try:
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(MeasurementError, match="parametrized and in training"),
        ):
            model(torch.randn(99, 6))
    finally:
        probe.remove()


def test_another_weight_in_a_later_batch_raises(model):
    class Moving(Model):
        def forward(self, x: Tensor) -> Tensor:
            given = super().forward(x)
            with torch.no_grad():
                self.up.weight += 0.1
            return given

    moving = Moving()
    with pytest.raises(MeasurementError, match="a different weight in each run"):
        row_of(moving, [torch.randn(99, 6)] * 2, moving.ffns())


def test_a_nonlinearity_that_overwrites_pre_raises(model):
    overwriting = nn.Sequential(model.up, nn.ReLU(inplace=True), model.down)
    with pytest.raises(MeasurementError, match=r"overwrites it\. Use one with inplace=False"):
        row_of(overwriting, [torch.randn(9, 6)], model.ffns())


@pytest.mark.parametrize("value", ["exact", 1, None])
def test_an_invalid_shortcut_raises(model, value):
    with pytest.raises(ConfigError, match="shortcut must be true, false or projected; got"):
        nerve.measure(model, [torch.randn(9, 6)], ffns=model.ffns(), shortcut=value)
