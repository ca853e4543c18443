"""Products keep every digit of their dtype whatever the user has set, and do not change the
settings."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from nerve.spectra import StreamingCovariance, product
from nerve.spectra.product import PRODUCTS, add_lower, default_product, full_precision

CUDA = torch.backends.cuda.matmul
BACKENDS = (CUDA, torch.backends.mkldnn.matmul)
SETTINGS: dict[str, Callable[[], None]] = {
    "defaults": lambda: None,
    "precision high": lambda: torch.set_float32_matmul_precision("high"),
    "precision medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(CUDA, "allow_tf32", True),
    "everywhere tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "cuda tf32": lambda: setattr(CUDA, "fp32_precision", "tf32"),
    "cpu bf16": lambda: setattr(BACKENDS[1], "fp32_precision", "bf16"),
    "float16 sums": lambda: setattr(CUDA, "allow_fp16_accumulation", True),
}


def settings() -> tuple[object, ...]:
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to name one once the newer switches are in use
        overall = None
    per_backend = tuple(backend.fp32_precision for backend in BACKENDS)
    return overall, *per_backend, torch.backends.fp32_precision, CUDA.allow_fp16_accumulation


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in BACKENDS:
        backend.fp32_precision = "none"
    CUDA.allow_fp16_accumulation = False


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """The settings during each product."""
    states: list[tuple[object, ...]] = []

    def spy(total: Tensor, a: Tensor, b: Tensor, *matmul: Callable[..., Tensor]) -> None:
        precisions = [backend.fp32_precision for backend in BACKENDS]
        states.append((*precisions, CUDA.allow_fp16_accumulation, (a.T @ b).dtype))
        add_lower(total, a, b, *matmul)

    monkeypatch.setattr(product, "add_lower", spy)
    return states


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("name", "multiplied"),
    [
        ("float32", torch.float32),
        ("float16x2", torch.float16),
        ("bfloat16", torch.bfloat16),
    ],
)
def test_reduced_precision_is_off_during_products_and_restored_after_them(
    setting, name, multiplied, seen
):
    SETTINGS[setting]()
    before = settings()
    x = torch.tensor([[1.0, -1], [-1, 1]], dtype=multiplied)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        StreamingCovariance(2, product=name).update(x)
        assert torch.is_autocast_enabled("cpu")
    assert {*seen} == {("ieee", "ieee", False, multiplied)}
    assert settings() == before


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_in_float64_change_no_setting(setting, seen):
    """Other threads train meanwhile, and the settings belong to the whole process."""
    SETTINGS[setting]()
    before = [backend.fp32_precision for backend in BACKENDS]
    StreamingCovariance(4, product="float64").update(torch.ones(5, 4))
    assert [[*state[:2]] for state in seen] == [before]


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_restored_after_an_error(setting):
    SETTINGS[setting]()
    before = settings()
    with pytest.raises(ZeroDivisionError), full_precision():
        _ = 1 / 0
    assert settings() == before


def test_an_inherited_setting_stays_inherited():
    torch.backends.fp32_precision = "tf32"
    with full_precision():
        pass
    torch.backends.fp32_precision = "ieee"
    assert [backend.fp32_precision for backend in BACKENDS] == ["ieee", "ieee"]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("dim", [1, 6, 400, 1537])
def test_products_add_the_gram_matrix_to_the_lower_triangle(name, dim):
    """In one block of columns, and in several, of which the last one is narrower."""
    product = PRODUCTS[name]
    y = torch.randn(50, dim, generator=torch.Generator().manual_seed(0)).to(product.dtype)
    total = torch.eye(dim, dtype=torch.float64)
    product.add(total, y)
    expected = torch.eye(dim, dtype=torch.float64) + y.double().T @ y.double()
    torch.testing.assert_close(total.tril(), expected.tril(), rtol=0, atol=1e-6 * 50)


def test_add_lower_multiplies_two_different_matrices():
    a, b = (
        torch.randn(30, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    total = torch.zeros(500, 500, dtype=torch.float64)
    add_lower(total, a, b)
    torch.testing.assert_close(total.tril(), (a.T @ b).tril(), rtol=1e-12, atol=1e-12)


def test_tensor_cores_are_only_for_16_bit_features_on_a_gpu():
    cpu = torch.device("cpu")
    assert default_product(torch.bfloat16, cpu) == "float32"
    assert default_product(torch.float32, cpu) == "float32"
    assert default_product(torch.float64, cpu) == "float64"


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_bfloat16_is_multiplied_only_by_tensor_cores_that_can(monkeypatch, capability, name):
    """Those of older GPUs multiply float16 only."""
    gpu = torch.device("cuda", 7)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(product, "_multiplies_bfloat16", product._multiplies_bfloat16.__wrapped__)
    assert default_product(torch.bfloat16, gpu) == name
    assert default_product(torch.float16, gpu) == "float16x2"


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "float16x2"),
        (torch.float32, "float64"),
        (torch.float64, "float64"),
    ],
)
def test_the_default_on_a_gpu(dtype, name):
    assert default_product(dtype, torch.device("cuda")) == name


@pytest.mark.cuda
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 1e-5)])
def test_a_gpu_product_keeps_its_digits_whatever_the_settings(setting, dtype, tolerance):
    """TF32 would be off by several 1e-5, and sums in float16 by 1e-3."""
    x = torch.randn(4096, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    x = x.to(dtype)
    SETTINGS[setting]()
    streaming = StreamingCovariance(256, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        streaming.update(x)
    expected = torch.cov(x.double().T)
    torch.testing.assert_close(streaming.covariance(), expected, rtol=0, atol=tolerance)
