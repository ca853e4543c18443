"""Runs a model, or its blocks separately, to see which features depend on which."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nerve.errors import MeasurementError
from nerve.measuring.dependence import Dependence
from nerve.measuring.ffns import declared_widths, is_adapter, is_pointwise
from nerve.measuring.forward import call, evaluating
from nerve.measuring.routing import Routing
from nerve.measuring.slices import Products, Slice, stacked
from nerve.measuring.streams import tensors_of

_FEW = 2
_SHORT = 16
"""Number of sequences, and positions of each, in the forward pass that searches for FFNs."""


def projections_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that multiply by a matrix, including adapters that wrap one of the same
    widths, but not networks that declare their width."""
    found: dict[nn.Module, None] = {}

    def walk(module: nn.Module) -> None:
        if _is_projection(module):
            found[module] = None
            return
        for child in module.children():
            walk(child)

    walk(model)
    return list(found)


def _is_projection(module: nn.Module) -> bool:
    widths = declared_widths(module)
    if widths is None or (isinstance(module, nn.modules.conv._ConvNd) and not is_pointwise(module)):
        return False
    if is_adapter(module):
        return _is_affine(module, widths.d_in)
    inner = [declared_widths(each) for each in module.modules() if each is not module]
    return not any(inner) or widths in inner


def _is_affine(module: nn.Module, d_in: int) -> bool:
    """Whether random features show that a module is affine, as an adapter is; a small FFN beside a
    linear layer is not. False for one that takes no features, such as a network with an
    embedding."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None:
        return True
    features = torch.randn(1, 8, d_in, generator=torch.Generator().manual_seed(0)).to(weight)
    with evaluating(module):
        for x in (features[0], features):
            with suppress(Exception):  # of any kind, for features of another shape
                return _are_affine([module(x * scale) for scale in (1.0, 0.5, 0.0, -0.5)], module)
    return False


def _are_affine(outputs: Sequence[Tensor], module: nn.Module) -> bool:
    whole, half, none, back = outputs
    off = (whole + back - half - none).abs().max() / whole.abs().max()
    kinds = {whole.dtype, *(p.dtype for p in module.parameters() if p.is_floating_point())}
    return not off > max(_LEAST_CURVED, *(4 * torch.finfo(kind).eps for kind in kinds))


_LEAST_CURVED = 5e-3
"""Deviations from an affine function up to this share of its values are rounding: TF32 rounds
factors to 11 digits. Types of 16 bits: four times their precision."""

# One forward pass


class Seen(NamedTuple):
    """What a forward pass has shown.

    Attributes:
        dependence: which features depend on which.
        products: those of the modules whose parameters hold several matrices.
        mixtures: for each list of experts, the module whose tokens they receive.
    """

    dependence: Dependence
    products: Sequence[Products]
    mixtures: Mapping[nn.Module, nn.Module]


def look_at(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], object]) -> Seen:
    """The dependences in a forward pass: of a few sequences of the batch, of an example that the
    model provides, or of its blocks separately.

    Args:
        model: the model, which is left unchanged.
        batch: a batch for `forward`, or None.
        forward: runs the model on one batch.
    """
    if _is_sharded(model):
        raise MeasurementError(
            "find_ffns needs an unsharded model; the weights of this one are sharded (FSDP), and "
            "looking at parts of it would disturb its training. Find the FFNs before it is "
            "sharded, and pass them: ffns=nerve.find_ffns(model, batch)."
        )
    _require_values(model, batch)
    paths = {module: path for path, module in model.named_modules()}

    def is_gate(module: nn.Module) -> bool:
        return "gate" in (module.label if isinstance(module, Slice) else paths[module])

    convolutions = [each for each in paths if isinstance(each, nn.modules.conv._ConvNd)]
    inside = {each for convolution in convolutions for each in convolution.modules()}
    # The parametrized weight of a convolution, in a module inside it, is one matrix.
    products = [Products(each) for each in paths if any(stacked(each)) and each not in inside]
    routing = Routing(model)
    seen = Dependence(
        projections_of(model), is_gate, products, lambda: routing.install(projections_of)
    )
    with evaluating(model):
        if batch is not None:
            _watch_few(seen, partial(forward, model), batch)
        elif not any(_works(seen, model, example) for example in _examples(model)):
            _watch_blocks(seen, model)
    return Seen(seen, products, routing.mixtures)


def _require_values(model: nn.Module, batch: Any) -> None:
    """Raises `MeasurementError` if there are no values to look at."""
    given = list(tensors_of(batch))
    if any(each.is_meta for each in (*model.parameters(), *given)):
        raise MeasurementError(
            "FFNs are found in a forward pass, so weights and batch must have values; some are on "
            "the meta device. Load the weights first (model.to_empty allocates memory for them)."
        )
    if given and not any(each.numel() for each in given):
        raise MeasurementError(
            "FFNs are found in a forward pass, so the first batch must have samples; got tensors "
            f"of the shapes {', '.join(str(tuple(each.shape)) for each in given)}. Put a batch "
            "with samples first."
        )


def _is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are sharded by either kind of FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = (getattr(fsdp, name, None) for name in ("FullyShardedDataParallel", "FSDPModule"))
    known = tuple(kind for kind in kinds if kind is not None)
    return any(isinstance(module, known) for module in model.modules())


def _watch_few(seen: Dependence, run: Callable[[Any], object], batch: Any) -> None:
    """Runs on a few short sequences if the model can, and otherwise on the whole batch."""
    for part in (_cut(batch, _FEW, _SHORT), _cut(batch, _FEW, None)):
        try:
            seen.watch(partial(run, part))
        except Exception:
            seen.forget()
            continue
        if seen.links and not seen.not_finite:
            return
        seen.forget()
    try:
        seen.watch(partial(run, batch))
    except RuntimeError as error:
        raise MeasurementError(
            "To find FFNs, the model runs on the first batch with autograd enabled; it failed: "
            f"{error}. If the batch is right, describe the FFNs with nerve.FFNAdapter."
        ) from error


def _cut(batch: Any, n_sequences: int, n_positions: int | None) -> Any:
    """The first sequences of every tensor that has as many as the first one; for tokens (integers
    `[batch, sequence]`) and their masks, only the first positions."""
    tensors = [each for each in tensors_of(batch) if each.ndim]
    n = len(tensors[0]) if tensors else 0

    def cut(each: Any) -> Any:
        if isinstance(each, Mapping):
            return {key: cut(value) for key, value in each.items()}
        if isinstance(each, tuple | list) and type(each) in (tuple, list):
            return type(each)(cut(value) for value in each)
        if not isinstance(each, Tensor) or not each.ndim or len(each) != n:
            return each
        each = each[:n_sequences]
        short = each.ndim == 2 and not each.is_floating_point()
        return each[:, :n_positions].contiguous() if short else each

    return cut(batch)


def _examples(model: nn.Module) -> Iterator[Any]:
    """Batches that the model provides as examples."""
    for name in ("dummy_inputs", "example_input_array"):
        example = getattr(model, name, None)
        if example is not None:
            device = next(model.parameters()).device
            yield _moved(example, device)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return batch


def _works(seen: Dependence, model: nn.Module, batch: Any) -> bool:
    try:
        seen.watch(partial(call, model, batch))
    except Exception:
        seen.forget()
    return bool(seen.links)


# Without a batch: blocks by themselves


def _watch_blocks(seen: Dependence, model: nn.Module) -> None:
    """Runs the smallest modules that contain two matching projections, each on random features."""
    projections = set(projections_of(model))
    done: set[nn.Module] = set()
    for module in _inner_first(model):
        if module in projections:
            continue
        inside = [each for each in module.modules() if each in projections and each not in done]
        for first, x in _inputs(inside):
            if first in done:
                continue
            try:
                seen.watch(partial(module, x))
            except Exception:
                continue
            for link in seen.links.values():
                done |= {link.pre.module, link.post}
                done |= set() if link.other is None else {link.other.module}


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _inner_first(child)
    yield module


def _inputs(inside: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, Tensor]]:
    """Random features for each pair of matching projections."""
    for first in inside:
        a = declared_widths(first)
        fits = any(
            (b := declared_widths(each)) is not None
            and each is not first
            and a is not None
            and a.d_out in (b.d_in, 2 * b.d_in)
            and a.d_in == b.d_out
            for each in inside
        )
        weight = next((p for p in first.parameters() if p.is_floating_point()), None)
        if a is not None and fits and weight is not None:
            sizes = [2, 8] if a.axis == -1 else [2] + [4] * (-1 - a.axis)
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(*sizes, a.d_in, generator=generator).to(weight)
            yield first, x if a.axis == -1 else x.movedim(-1, 1)
