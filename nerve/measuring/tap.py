"""Passes features from a model to their receiver: refuses invalid ones, and hands them on through a
custom operator, which compiled code keeps."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from nerve.errors import MeasurementError
from nerve.measuring.ffns import Site, argument, replaced

_WITHOUT_FLOAT64 = ("mps",)


def plain(features: Any, side: str, where: str) -> Tensor:
    """The tensor, detached.

    Args:
        features: the input or output of a module.
        side, where: the side and the FFN, for messages.

    Raises:
        MeasurementError: unless it is one plain tensor of floats.
    """
    if isinstance(features, DTensor):
        raise _split(where)
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise MeasurementError(
            f"Features must be one floating-point tensor; {side} of {where} is "
            f"{type(features).__name__}. Give the modules whose output (pre) and first argument "
            "(post) are the features."
        )
    if features.device.type in _WITHOUT_FLOAT64:
        raise MeasurementError(
            "Features must be on a device that supports float64, in which covariances are "
            f"accumulated; {side} of {where} is on {features.device}. Run the model on a CPU or an "
            "NVIDIA GPU."
        )
    if torch.compiler.is_compiling():
        return features.detach()
    if features.is_nested or features.layout != torch.strided or features.is_quantized:
        kind = "nested" if features.is_nested else str(features.layout)
        raise MeasurementError(
            f"Features must be one plain, strided tensor; {side} of {where} is "
            f"{'quantized' if features.is_quantized else kind}. For nn.TransformerEncoder: "
            "torch.backends.mha.set_fastpath_enabled(False) keeps it dense, and mask= excludes "
            "padding."
        )
    if _in_vmap():
        raise MeasurementError(
            f"Features must be those of a whole batch; {side} of {where} is that of one item, "
            "inside torch.func.vmap. Give held-out batches with heldout=, or call nerve.measure."
        )
    if type(features).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise MeasurementError(
            f"Features must be one plain tensor; {side} of {where} is {type(features).__name__}, "
            "whose values only its own operators can read."
        )
    return features.as_subclass(Tensor).detach()


def _in_vmap() -> bool:
    """Whether torch.func.vmap is active, at any depth of transforms."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(each.key() == torch._C._functorch.TransformType.Vmap for each in levels)


def of_site(tensor: Tensor, site: Site, where: str) -> Tensor:
    """The features `[*samples, width]` of a site.

    Raises:
        MeasurementError: if the feature axis is not as wide as the module declares.
    """
    axis, declared = site.feature_axis, site.declared
    if not -tensor.ndim <= axis < tensor.ndim or (
        declared is not None and tensor.shape[axis] != declared
    ):
        raise MeasurementError(
            f"The feature axis of {where} must be as wide as {type(site.module).__name__} "
            f"declares, {declared}; axis {axis} of {tuple(tensor.shape)} is not."
        )
    return site.features(tensor)


def check_same_samples(pre: Tensor, post: Tensor, where: str) -> None:
    """Raises `MeasurementError` unless both have the same number of samples and features."""
    if pre.numel() != post.numel() or pre.shape[-1] != post.shape[-1]:
        raise MeasurementError(
            "Features before and after a nonlinearity must have the same samples and width; "
            f"{where} has {tuple(pre.shape)} before and {tuple(post.shape)} after. Check the "
            "modules in its description."
        )


def check_whole(module: nn.Module, where: str) -> None:
    """Raises `MeasurementError` for a module whose weights are slices: its output is then a slice,
    too, which no type shows."""
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise _split(where)


def _split(where: str) -> MeasurementError:
    """The error for features that are slices."""
    return MeasurementError(
        "Features must not be sharded, since the spectra of slices do not add up; those of "
        f"{where} are split over processes by tensor parallelism. Train with data parallelism or "
        "FSDP."
    )


class Hook:
    """A hook that looks at a module's input or output. Copies of the module and saved ones do not
    have it: they are other models, which are not measured.

    Args:
        look: takes the arguments of hooks; its result, unless None, replaces the tensor.
    """

    def __init__(self, look: Callable[..., Any]) -> None:
        self._look = look

    def __call__(self, *args: Any) -> Any:
        return self._look(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Hook, (inert_hook,)

    @property
    def __name__(self) -> str:
        """None: `torch.jit.script` asks for it, to compile the hook."""
        raise AttributeError(
            "A model that nerve measures has hooks in Python, which torch.jit.script cannot "
            "compile. Script it before or after the measurement, or use torch.export."
        )


def inert_hook(*args: Any) -> None:
    """The hook of a copy, which does nothing."""


def hook_at(
    site: Site, is_on: Callable[[], bool], look: Callable[[Any, Any], Any]
) -> RemovableHandle:
    """Registers a hook at a site, which calls `look` while `is_on`.

    Args:
        look: takes the input of the module and the whole tensor at the site: its output, or the
            input again. If it returns a tensor, the model continues with that one.
    """

    def of_output(module: nn.Module, args: tuple[Any, ...], kwargs: Any, given: Any) -> Any:
        return look(argument(args, kwargs), given) if is_on() else None

    def of_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_on():
            return None
        given = argument(args, kwargs)
        other = look(given, given)
        return None if other is None else replaced(args, kwargs, other)

    if site.of == "output":
        return site.module.register_forward_hook(Hook(of_output), with_kwargs=True)
    return site.module.register_forward_pre_hook(Hook(of_input), with_kwargs=True)


def put_last(handle: RemovableHandle) -> None:
    """Puts a hook behind those that other code has registered since, and that may change what the
    module gets or returns."""
    hooks = handle.hooks_dict_ref()
    if hooks is None or handle.id not in hooks:
        return
    numbers = list(hooks)
    if any(not isinstance(hooks[n], Hook) for n in numbers[numbers.index(handle.id) + 1 :]):
        hooks.move_to_end(handle.id)


class Taker(Protocol):
    """A receiver of features.

    Attributes:
        is_taking: whether it is receiving features now.
        thread: the thread that started it.
    """

    thread: int

    @property
    def is_taking(self) -> bool: ...

    def take(self, index: int, inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor) -> None:
        """Receives the features of an FFN."""

    def paused(self) -> AbstractContextManager[None]:
        """Receives nothing within the block, and continues afterwards."""


_numbers = count()
_takers: WeakValueDictionary[int, Taker] = WeakValueDictionary()


def registered(taker: Taker) -> int:
    """The number by which `tap` finds the receiver: compiled code cannot refer to it otherwise."""
    number = next(_numbers)
    _takers[number] = taker
    return number


def is_taking() -> bool:
    """Whether anything is tapping features, in which case hooks must run in Python."""
    return any(taker.is_taking for taker in _registered())


def _registered() -> list[Taker]:
    """All current takers, even while other threads register theirs."""
    return [taker for each in _takers.valuerefs() if (taker := each()) is not None]


class _Looks(threading.local):
    """State of this thread only: another one may be training a model."""

    n = 0


_looks = _Looks()


@contextmanager
def looking(own: Taker | None) -> Iterator[None]:
    """Runs a model for inspection within the block, possibly in the middle of a measured pass: of
    the active takers only `own` continues, others pause."""
    here = threading.get_ident()
    others = [each for each in _registered() if each is not own and each.is_taking]
    with ExitStack() as stack:
        for other in (each for each in others if each.thread == here):
            stack.enter_context(other.paused())
        _looks.n += 1
        try:
            yield
        finally:
            _looks.n -= 1


def is_looking() -> bool:
    """Whether a model is running for inspection, which is not a pass of its own."""
    return _looks.n > 0


@torch.library.custom_op("nerve::tap", mutates_args={"order"})
def tap(
    inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor, order: Tensor, taker: int, index: int
) -> None:
    """Gives features to a taker. It is declared to mutate `order`, so that the compiler neither
    drops nor reorders it."""
    _takers[taker].take(index, inputs, pre, post, sample)


@tap.register_fake
def _(
    inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor, order: Tensor, taker: int, index: int
) -> None:
    """Tracing taps nothing."""
