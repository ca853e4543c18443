"""How `y^T y` of centred features is taken: in which precision, and how exactly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """A way to take `y^T y`.

    Attributes:
        dtype: the type of `y`.
        n_rows: rows at a time. Within a chunk, sums are rounded in the product's own type; more
            rows mean more rounding, fewer mean more additions of `dim x dim` float64 matrices.
        add: adds to a float64 matrix, in place, one whose symmetric part is `y^T y`.
        centred: whether `y` is centred first, which costs passes over it, or the mean is taken out
            of the sum, which costs digits where the mean is large.
    """

    dtype: torch.dtype
    n_rows: int
    add: Callable[[Float64[Tensor, "dim dim"], Float[Tensor, "n dim"]], None]
    centred: bool = True


def _add_symmetric(
    total: Float64[Tensor, "dim dim"],
    y: Float[Tensor, "n dim"],
    matmul: Callable[[Tensor, Tensor], Tensor] = torch.mm,
) -> None:
    """Takes the lower triangle alone, in up to four block columns: 5/8 of the work."""
    dim = y.shape[1]
    width = dim if dim < 512 else -(-dim // 4)
    for start in range(0, dim, width):
        stop = min(start + width, dim)
        column = matmul(y[:, start:].T, y[:, start:stop])
        total[start:stop, start:stop] += column[:width]
        total[stop:, start:stop].add_(column[width:], alpha=2)


def _add_tensor_core_product(total: Float64[Tensor, "dim dim"], y: Float[Tensor, "n dim"]) -> None:
    """Products of 16-bit numbers are exact in float32, the type that tensor cores sum in."""
    _add_symmetric(total, y, _sixteen_bit_matmul)


def _add_float16x2_product(total: Float64[Tensor, "dim dim"], y: Float32[Tensor, "n dim"]) -> None:
    """`y = high + low`, two float16 numbers that hold 22 binary digits of y between them.

    `low^T low`, below 2**-24 of the variances, is left out. `|y|` must be below 65,504.
    """
    high = y.half()
    low = (y - high).half()
    _add_symmetric(total, high, _sixteen_bit_matmul)
    total.add_(_sixteen_bit_matmul(high.T, low), alpha=2)


def _sixteen_bit_matmul(
    a: Float[Tensor, "rows n"], b: Float[Tensor, "n columns"]
) -> Float32[Tensor, "rows columns"]:
    """A product of 16-bit matrices that is summed and returned in float32; CUDA has it built in."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# From the coarsest to the finest. Tensor cores truncate, so the rounding of a sum of squares grows
# with the rows of a chunk: 1e-5 at 4,096, 2e-6 at 1,024. float32 rounds to nearest.
PRODUCTS: dict[str, Product] = {
    "bfloat16": Product(torch.bfloat16, 1024, _add_tensor_core_product, centred=False),
    "float16x2": Product(torch.float32, 1024, _add_float16x2_product),
    "float32": Product(torch.float32, 2048, _add_symmetric),
    "float64": Product(torch.float64, 4096, _add_symmetric),
}


def default_product(dtype: torch.dtype, device: torch.device) -> str:
    """The name of the product that features of `dtype` deserve on `device`.

    On an NVIDIA GPU of a data centre, float64 is as fast as float32 without its rounding, and
    16-bit features have tensor cores; elsewhere 16-bit features are taken as float32. Products of
    bfloat16 numbers have 16 digits, which tensor cores sum without loss; those of float16 have 22,
    some of which are cut off, so that they pay for being centred.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return "float64" if dtype == torch.float64 else "float32"
    return {torch.bfloat16: "bfloat16", torch.float16: "float16x2"}.get(dtype, "float64")


_SIXTEEN_BIT_SUMS = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Makes matrix products keep every digit of their type, whatever the caller has set.

    Turns off autocast and the global switches that trade digits for speed (TF32, bfloat16 in place
    of float32, sums in 16 bits), and sets them back.
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
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for name, value in sums.items():
            setattr(cuda, name, value)
        for backend, precision in zip(backends, precisions, strict=True):
            # What was inherited from torch.backends.fp32_precision stays inherited.
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision
