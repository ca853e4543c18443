"""The surroundings of an FFN's nonlinearity: the residual stream, the FFN's input and output.

If a model does not declare them, they are found in one forward pass: the stream after an FFN is the
stream before it plus the FFN's output.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nerve.measuring.ffns import (
    FFN,
    Site,
    argument,
    declared_widths,
    named,
    sites_of,
    tokens_of,
)
from nerve.measuring.link import rows_of

log = logging.getLogger(__name__)

Stream = tuple[Site, Site]
"""The residual stream before an FFN, and after it."""

_ROWS = 32
"""Minimum number of samples that distinguish a stream from others."""


def sites_around(
    ffns: Sequence[FFN],
    wanted: Collection[str],
    find: Callable[[], list[Stream | None]] | None = None,
) -> list[dict[str, Site]]:
    """For each FFN, the requested sites to tap, as far as they are known; a warning names the
    others. `input` is not among them: a probe reads it together with pre.

    Args:
        ffns: the FFNs.
        wanted: the requested ones of `nerve.sites_and_groups.AROUND`.
        find: finds the streams that descriptions do not declare; None if that is impossible.
    """
    streams = [stream_of(ffn) for ffn in ffns]
    of_stream = not {"stream_in", "stream_out"}.isdisjoint(wanted)
    if find is not None and of_stream and not all(streams):
        streams = [own or found for own, found in zip(streams, find(), strict=True)]
    given = []
    for ffn, stream in zip(ffns, streams, strict=True):
        around = {}
        pre, post = sites_of(ffn)
        of_all = tokens_of(ffn) is None  # an expert gets some of the tokens
        if of_all and post.of == "input" and declared_widths(post.module) is not None:
            around["output"] = Site(post.module, "output")
        if of_all and stream is not None:
            around["stream_in"], around["stream_out"] = stream
        known = {*around, "input"} if pre.of == "output" else {*around}
        unknown = [name for name in wanted if name not in known]
        if unknown:
            log.warning(
                "%s: %s cannot be measured because their place in the model is unknown",
                named(ffn),
                ", ".join(unknown),
            )
        given.append({name: site for name, site in around.items() if name in wanted})
    return given


def stream_of(ffn: FFN) -> Stream | None:
    """The stream around an FFN as its description declares it."""
    stream = getattr(ffn, "stream", None)
    if isinstance(stream, nn.Module):
        return Site(stream, "input"), Site(stream, "output")
    return stream


def find_streams(
    model: nn.Module, ffns: Sequence[FFN], run: Callable[[], object]
) -> list[Stream | None]:
    """The stream around each FFN if one forward pass shows it; None otherwise.

    It is found if the output of the FFN is added to what some module receives, and if the sum is
    the output of some module (or, if the sum is normalized, the input of the norm).

    Args:
        model: the model.
        ffns: the FFNs.
        run: runs the model on a batch, without gradients and in eval mode.
    """
    events: list[_Event] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _note(events, module, "input", argument(args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        _note(events, module, "output", output)

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [_stream(ffn, events) for ffn in ffns]


class _Event(NamedTuple):
    """Some of the samples that a module received or returned."""

    module: nn.Module
    of: Any
    shape: torch.Size
    rows: Tensor


def _note(events: list[_Event], module: nn.Module, of: str, value: Any) -> None:
    tensor = value[0] if isinstance(value, tuple | list) and value else value
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim > 1:
        rows = rows_of(tensor.detach(), module)
        if rows.numel():
            some = rows[:: max(1, len(rows) // _ROWS)].float().clone()
            events.append(_Event(module, of, rows.shape, some))


def _stream(ffn: FFN, events: Sequence[_Event]) -> Stream | None:
    """The latest stream before the FFN to which its output is added, and the sum."""
    pre, post = sites_of(ffn)
    starts = [i for i, event in enumerate(events) if event.module is pre.module]
    ends = [
        i for i, event in enumerate(events) if event.module is post.module and event.of == "output"
    ]
    if not starts or len(ends) != 1:
        return None
    begin, end = starts[0], ends[0]
    output = events[end]
    for candidate in reversed(events[: begin + 1]):
        if candidate.shape != output.shape or candidate.of != "input":
            continue
        total = candidate.rows + output.rows
        for i, event in enumerate(events[end + 1 :], end + 1):
            if event.shape == output.shape and _is_same(event.rows, total):
                given = _normalized(event, events[i + 1 :], candidate, events[begin])
                return Site(candidate.module, "input"), given
    return None


def _normalized(total: _Event, later: Sequence[_Event], before: _Event, given: _Event) -> Site:
    """The stream after the FFN: the sum, or the output of a norm after it if the FFN receives the
    stream unnormalized."""
    gets_stream = _is_same(before.rows, given.rows) if before.shape == given.shape else False
    if gets_stream and total.of == "input":
        normed = next((e for e in later if e.module is total.module and e.of == "output"), None)
        if normed is not None and normed.shape == total.shape:
            return Site(total.module, "output")
    return Site(total.module, total.of)


def _is_same(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-5 * float(other.abs().nan_to_num().amax())
    return torch.allclose(one, other, rtol=1e-4, atol=tolerance)
