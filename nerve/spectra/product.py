"""The ways to compute `y^T y` of features: their precision, and what they cost."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from nerve.shared_context import SharedContext


@dataclass(frozen=True)
class Product:
    """A way to compute `y^T y`.

    Attributes:
        dtype: the type of `y`.
        n_rows: rows at a time. Within a chunk, sums are rounded in the product's own type; more
            rows mean more rounding, fewer mean more additions of `dim x dim` float64 matrices.
        add: adds it in place to the lower triangle (with the diagonal) of a float64 matrix, whose
            upper triangle is undefined.
        centered: whether `y` is centered first, which costs passes over it; otherwise the mean is
            subtracted from the sum, which costs digits if the mean is large.
    """

    dtype: torch.dtype
    n_rows: int
    add: Callable[[Float64[Tensor, "dim dim"], Float[Tensor, "n dim"]], None]
    centered: bool = True


# Blocks of fewer columns would use the cores less well.
_LEAST_WIDTH = 192


def add_lower(
    total: Float64[Tensor, "dim dim"],
    a: Float[Tensor, "n dim"],
    b: Float[Tensor, "n dim"],
    matmul: Callable[[Tensor, Tensor], Tensor] = torch.mm,
) -> None:
    """Adds the lower triangle of `a^T b` to that of `total`, in up to eight block columns: 9/16 of
    the work of the whole product."""
    dim = total.shape[0]
    width = max(_LEAST_WIDTH, -(-dim // 512) * 64)  # tensor cores want multiples
    for start in range(0, dim, width):
        stop = min(start + width, dim)
        total[start:, start:stop] += matmul(a[:, start:].T, b[:, start:stop])


_SIXTEEN_BIT_SUMS = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


@SharedContext
@contextmanager
def full_precision() -> Iterator[None]:
    """Makes torch's products of 32 and 16 bits keep every digit, whatever the caller has set.

    Turns off the switches that trade digits for speed (TF32, bfloat16 instead of float32, sums in
    16 bits), and restores them. They are switches of the whole process: meanwhile the products of
    other threads keep every digit as well, and code that they have compiled for other settings may
    be compiled again. So this is only for products that depend on them: not for those in float64,
    nor for `nerve.spectra.kernels`.
    """
    cuda = torch.backends.cuda.matmul
    sums = {name: getattr(cuda, name) for name in _SIXTEEN_BIT_SUMS}
    backends = (cuda, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions = [backend.fp32_precision for backend in backends]
    try:
        for name in sums:
            setattr(cuda, name, False)
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for name, value in sums.items():
            setattr(cuda, name, value)
        for backend, precision in zip(backends, precisions, strict=True):
            # What was inherited from torch.backends.fp32_precision stays inherited.
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def _add_float64_product(total: Float64[Tensor, "dim dim"], y: Float64[Tensor, "n dim"]) -> None:
    add_lower(total, y, y)


def _add_float32_product(total: Float64[Tensor, "dim dim"], y: Float32[Tensor, "n dim"]) -> None:
    with full_precision():
        add_lower(total, y, y)


def _add_bfloat16_product(total: Float64[Tensor, "dim dim"], y: Float[Tensor, "n dim"]) -> None:
    if has_kernels(y.device):
        from nerve.spectra import kernels  # triton is not available everywhere

        kernels.add_lower_products(total, [(y, y)], _BFLOAT16_TERMS)
        return
    with full_precision():
        for rows in y.split(16_384):
            add_lower(total, rows, rows, _tensor_core_matmul(_BFLOAT16_TERMS))


_BFLOAT16_TERMS, _FLOAT16_TERMS = 512, 256
"""Number of products that tensor cores sum without help: fewer for products with more digits; see
`_tensor_core_matmul`."""

_LEAST_CAPABILITY = (8, 0)
"""The lowest compute capability whose tensor cores multiply bfloat16."""


@cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether `device` can run the kernels of `nerve.spectra.kernels`."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and importlib.util.find_spec("triton") is not None
        and _multiplies_bfloat16(device)
    )


def _add_float16x2_product(total: Float64[Tensor, "dim dim"], y: Float32[Tensor, "n dim"]) -> None:
    """`y = high + low`, two float16 numbers that hold 22 binary digits of y between them.

    `low^T low`, below 2**-24 of the variances, is omitted. `|y|` must be below 65,504.
    """
    high = y.half()
    low = (y - high).half()
    if has_kernels(y.device):
        from nerve.spectra import kernels  # triton is not available everywhere

        pairs = [(high, high), (high, low), (low, high)]
        kernels.add_lower_products(total, pairs, _FLOAT16_TERMS)
        return
    matmul = _tensor_core_matmul(_FLOAT16_TERMS)
    with full_precision():
        add_lower(total, high, high, matmul)
        # high^T low + low^T high, in one product.
        add_lower(total, torch.cat([high, low]), torch.cat([low, high]), matmul)


def _tensor_core_matmul(n_terms: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A product of 16-bit matrices, whose products are exact in float32, summed in float32.

    Tensor cores truncate as they sum, so all sums are too small by a share that grows with the
    number of terms; with 1,024 terms it changes SE by up to 2e-5. Therefore, pieces of `n_terms`
    are summed separately, and their sums are added with rounding to nearest.
    """

    def matmul(
        a: Float[Tensor, "rows n"], b: Float[Tensor, "n columns"]
    ) -> Float32[Tensor, "rows columns"]:
        n = a.shape[1] // n_terms * n_terms
        whole = _batched_matmul(
            a[:, :n].unflatten(1, (-1, n_terms)).transpose(0, 1), b[:n].unflatten(0, (-1, n_terms))
        ).sum(0)
        if n < a.shape[1]:
            whole += _batched_matmul(a[None, :, n:], b[None, n:])[0]
        return whole

    return matmul


def _batched_matmul(
    a: Float[Tensor, "batch rows n"], b: Float[Tensor, "batch n columns"]
) -> Float32[Tensor, "batch rows columns"]:
    """The product in float32, which CUDA computes directly from 16-bit matrices."""
    if a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# From the coarsest to the finest.
PRODUCTS: dict[str, Product] = {
    "projected_bfloat16": Product(torch.float64, 4096, _add_float64_product),
    "projected_float16": Product(torch.float64, 4096, _add_float64_product),
    "bfloat16": Product(torch.bfloat16, 65_536, _add_bfloat16_product, centered=False),
    "float16x2": Product(torch.float32, 16_384, _add_float16x2_product),
    "float32": Product(torch.float32, 2048, _add_float32_product),
    "float64": Product(torch.float64, 4096, _add_float64_product),
}


def product_of_input(dtype: torch.dtype) -> str:
    """The name of the product for x if the covariance of `u = W x + b` is computed from that of x:
    in float64, because W would magnify rounding.

    If u has a 16-bit `dtype`, its own rounding is omitted. The name says so, and so does the
    precision of all results.
    """
    name = f"projected_{str(dtype).removeprefix('torch.')}"
    return name if name in PRODUCTS else "float64"


def coarsest(names: Iterable[str]) -> str:
    """The name of the least precise of several products that were used together."""
    return min(names, key=list(PRODUCTS).index)


def default_product(dtype: torch.dtype, device: torch.device) -> str:
    """The name of the default product for features of `dtype` on `device`.

    On an NVIDIA GPU of a data center, float64 is as fast as float32 and has less rounding, and
    16-bit features can use tensor cores; elsewhere 16-bit features are converted to float32, and
    so is bfloat16 on GPUs whose tensor cores do not multiply it. Products of two bfloat16 numbers
    have 16 binary digits, which tensor cores sum without loss. Those of float16 have 22, some of
    which are cut off, so that centering is worth its cost.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return "float64" if dtype == torch.float64 else "float32"
    if dtype == torch.bfloat16:
        return "bfloat16" if _multiplies_bfloat16(device) else "float32"
    return "float16x2" if dtype == torch.float16 else "float64"
