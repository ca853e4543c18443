"""Checks arguments given in Python, and refuses those of the wrong kind."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import wraps
from inspect import signature
from numbers import Integral
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nerve.config import require, require_choice, require_count
from nerve.measuring.ffns import FFN

P = ParamSpec("P")
R = TypeVar("R")

Loaded = nn.Module | Callable[[], nn.Module]
"""A model, or a function that loads it."""

_FUNCTIONS = {
    "mask": "mask=lambda batch: batch[...] != padding",
    "forward": "forward=lambda model, batch: model(batch[0])",
}


def explicit(**instead: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function refuse keyword arguments that it does not have, with similar names.

    Args:
        instead: what to give in place of an argument that its callers may expect, as a sentence.

    Raises:
        ConfigError: by the function, for such an argument.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = f"nerve.{function.__qualname__.removesuffix('.__init__')}"
        known = [each for each in signature(function).parameters if each != "self"]

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for key in kwargs:
                require(key not in instead, f"{name} has no argument {key}. {instead.get(key)}")
                require_choice(f"an argument of {name}", key, known)
            return function(*args, **kwargs)

        return checked

    return decorate


def require_model(model: object) -> None:
    """Raises `ConfigError` unless `model` is a torch module whose weights have sizes."""
    require(isinstance(model, nn.Module), f"model must be a torch module; got {told(model)}.")
    assert isinstance(model, nn.Module)
    lazy = next((name for name, each in model.named_parameters() if is_lazy(each)), None)
    require(
        lazy is None,
        f"The weights of a model must have sizes; {lazy} is that of a lazy module that has not run "
        "yet. Run the model on one batch first: model(batch).",
    )


def require_mapping(key: str, value: object) -> None:
    """Raises `ConfigError` unless `value` is a mapping by name, or None."""
    require(
        value is None or (isinstance(value, Mapping) and all(isinstance(k, str) for k in value)),
        f"{key} must be a mapping by name, such as {{'family': 'mine'}}; got {told(value)}.",
    )


def check_given(
    *,
    ffns: Sequence[FFN] | None = None,
    mask: Callable[..., Any] | None = None,
    forward: Callable[..., Any] | None = None,
    exclude: Collection[int] = (),
    layers: Sequence[int] | None = None,
) -> None:
    """Checks arguments that are called or iterated over, as `nerve.measure` takes them; `layers` of
    a monitor select layers to search, and exclude `ffns`.

    Raises:
        ConfigError: for an argument of the wrong kind.
    """
    for key, value in (("mask", mask), ("forward", forward)):
        require(
            value is None or callable(value),
            f"{key} must be a function of a batch; got {told(value)}. Give {_FUNCTIONS[key]}.",
        )
    require(
        isinstance(exclude, Collection) and all(_is_id(each) for each in exclude),
        "exclude must be a list of token ids, such as tokenizer.all_special_ids; got "
        f"{told(exclude)}.",
    )
    if ffns is None:
        return
    require(
        layers is None,
        "ffns already selects the FFNs to measure, so layers must be None; got both. Leave layers "
        "out, and the FFNs of the other layers out of ffns.",
    )
    is_list = isinstance(ffns, Sequence | nn.ModuleList) and not isinstance(ffns, str)
    wrong = next((each for each in ffns if not isinstance(each, FFN)), None) if is_list else ffns
    require(
        is_list and wrong is None,
        "ffns must be a list of descriptions of FFNs; got "
        f"{'one of ' if is_list else ''}{told(wrong)}. Give nerve.find_ffns(model, batch), "
        "optionally with select=, or describe each: "
        '[nerve.FFNAdapter(layer, "ffn", block.up, block.down)].',
    )


def series_of(model: Any, step: int) -> Iterable[tuple[int, Loaded]]:
    """The series that `measure` was given, checked: a list at once, an iterator while iterating.

    Raises:
        ConfigError: for what is neither a model nor a series, an item that is not a step and its
            model, or a duplicate step.
    """
    if isinstance(model, nn.Module):
        return [(step, model)]
    require(
        isinstance(model, Iterable) and not isinstance(model, str | bytes | Mapping | Tensor),
        f"model must be a torch module, or a series of (step, model); got {told(model)}. Load the "
        "weights into a module first; nerve-probe accepts the name or directory of a "
        "transformers model.",
    )
    known: set[int] = set()

    def checked(item: Any) -> tuple[int, Loaded]:
        is_pair = isinstance(item, tuple | list) and len(item) == 2
        of_kind = is_pair and (isinstance(item[1], nn.Module) or callable(item[1]))
        require(
            of_kind,
            "An item of a series is (step, model), the model a torch module or a function that "
            f"loads it; got {'(step, ' if is_pair else ''}{told(item[1] if is_pair else item)}"
            f"{')' if is_pair else ''}. Give (step, lambda: load(path)).",
        )
        require_count("the step of an item of a series", item[0], least=0)
        require(
            item[0] not in known,
            f"A series has one model for each step; step {item[0]} appears twice. Leave one out.",
        )
        known.add(item[0])
        return item[0], item[1]

    items = map(checked, model)  # keeps no item, so that a model can be freed before the next
    return list(items) if isinstance(model, Sequence) else items


def check_batches(batches: Any) -> None:
    """Raises `ConfigError` if a single batch is given instead of several."""
    require(
        not isinstance(batches, Tensor | Mapping | str),
        f"batches must be a list of batches; got one, a {type(batches).__name__}. Give [batch].",
    )
    if isinstance(batches, tuple | list) and all(isinstance(each, Tensor) for each in batches):
        # A list may contain batches of several shapes; a tuple is what loaders yield.
        is_tuple = isinstance(batches, tuple)
        kinds = {(each.is_floating_point(), each.ndim if is_tuple else 0) for each in batches}
        require(
            len(kinds) < 2,
            f"batches must be a list of similar batches; got a {type(batches).__name__} of "
            f"{', '.join(f'{each.dtype} {tuple(each.shape)}' for each in batches)}, which looks "
            "like one batch of a loader. Give [batch], and how the model is called with it: "
            "forward=lambda model, batch: model(batch[0]).",
        )


def told(value: object) -> str:
    """A value as messages show it: itself if short, otherwise its type."""
    text = repr(value)
    kind = type(value).__name__
    return f"{kind} {text}" if isinstance(value, str | int | float) and len(text) < 60 else kind


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
