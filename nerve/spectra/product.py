"""How `y^T y` of centred features is taken: in which precision, and how exactly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Float32, Float64
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """A way to take `y^T y`.

    Attributes:
        dtype: the type of `y`.
        n_rows: rows at a time. Within a chunk, sums are rounded in the product's own type; more
            rows mean more rounding, fewer mean more additions of `dim x dim` float64 matrices.
        add: adds to a float64 matrix, in place, one whose symmetric part is `y^T y`.
    """

    dtype: torch.dtype
    n_rows: int
    add: Callable[[Float64[Tensor, "dim dim"], Float[Tensor, "n dim"]], None]


def _add_product(total: Float64[Tensor, "dim dim"], y: Float[Tensor, "n dim"]) -> None:
    total.add_(y.T @ y)


def _add_float16x2_product(total: Float64[Tensor, "dim dim"], y: Float32[Tensor, "n dim"]) -> None:
    """`y = high + low`, two float16 numbers that hold 22 binary digits of y between them and whose
    products are exact in float32, the type that tensor cores sum in.

    `low^T low`, below 2**-24 of the variances, is left out. `|y|` must be below 65,504.
    """
    high = y.half()
    low = (y - high).half()
    total.add_(_float16_matmul(high.T, high)).add_(_float16_matmul(high.T, low), alpha=2)


def _float16_matmul(
    a: Float16[Tensor, "rows n"], b: Float16[Tensor, "n columns"]
) -> Float32[Tensor, "rows columns"]:
    """A float16 product that is summed and returned in float32; CUDA alone has it built in."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


# From the coarsest to the finest. On tensor cores, which truncate, the rounding of a float16x2 sum
# grows with the rows of a chunk: 4,096 keep it near 1e-6. float32 rounds to nearest, but costs so
# much more per row that small chunks come free.
PRODUCTS: dict[str, Product] = {
    "float16x2": Product(torch.float32, 4096, _add_float16x2_product),
    "float32": Product(torch.float32, 1024, _add_product),
    "float64": Product(torch.float64, 4096, _add_product),
}


def default_product(dtype: torch.dtype, device: torch.device) -> str:
    """The name of the product that features of `dtype` deserve on `device`."""
    if dtype == torch.float64:
        return "float64"
    has_tensor_cores = device.type == "cuda" and torch.version.cuda is not None
    return "float16x2" if dtype.itemsize == 2 and has_tensor_cores else "float32"


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Makes matrix products keep every digit of their type, whatever the caller has set.

    Turns off autocast and the global switches that trade digits for speed (TF32, bfloat16 in place
    of float32, float16 accumulation), and sets them back.
    """
    cuda = torch.backends.cuda.matmul
    accumulation = cuda.allow_fp16_accumulation
    backends = (cuda, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions = [backend.fp32_precision for backend in backends]
    try:
        cuda.allow_fp16_accumulation = False
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        cuda.allow_fp16_accumulation = accumulation
        for backend, precision in zip(backends, precisions, strict=True):
            # What was inherited from torch.backends.fp32_precision stays inherited.
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision
