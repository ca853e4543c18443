"""Taps the features of feed-forward networks (FFNs) while their model runs.

A probe knows modules and tensors' names, nothing of covariance or metrics: what it taps goes to the
`receive` function that it is given, as it appears, so that no activation is kept.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFN

SAMPLES = 8
"""How many samples of features are compared, at least, to see that a nonlinearity left them."""

Receive = Callable[[int, Tensor, Tensor, Tensor], None]
"""Takes an FFN's index and its features, detached: what the FFN gets `[*samples, d_in]`, and what
there is before and after its nonlinearity `[*samples, d_ff]`."""


class Probe:
    """Taps the features of FFNs in every forward pass between `start()` and `stop()`.

    Its hooks must be in place when a model is compiled: `install()` before the first call of
    compiled code. That code then exists in two versions, with the taps and without them, and
    starting and stopping chooses; a probe that is stopped costs nothing.

    Args:
        ffns: the FFNs to tap.

    Raises:
        MeasurementError: if there is none, or if two share layer and name.
    """

    def __init__(self, ffns: Sequence[FFN]) -> None:
        if not ffns:
            raise MeasurementError("A measurement needs at least one FFN; got an empty list.")
        doubled = [key for key, n in Counter((f.layer, f.name) for f in ffns).items() if n > 1]
        if doubled:
            raise MeasurementError(
                "Layer and name must tell FFNs apart; (layer, name) = "
                f"{doubled[0]} stands for several."
            )
        self.ffns = ffns
        self._receive: Receive | None = None
        # An FFN's input, pre, and a sample of pre as it was, until its nonlinearity is through.
        self._before: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._times: Counter[int] = Counter()
        self._handles: list[RemovableHandle] = []
        # Compiled code can name a probe by a number alone.
        self._number = next(_numbers)
        self._order = torch.zeros(())
        _probes[self._number] = self

    def install(self) -> None:
        """Puts the hooks in place."""
        for index, ffn in enumerate(self.ffns):
            self._handles += [
                ffn.pre.register_forward_hook(self._hook_pre(index)),
                ffn.post.register_forward_pre_hook(self._hook_post(index)),
            ]

    def remove(self) -> None:
        """Takes the hooks away; allowed at any time."""
        self.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self, receive: Receive) -> None:
        """From now on calls `receive` once for each FFN that runs."""
        self._receive = receive

    def stop(self) -> None:
        """Stops tapping; allowed at any time."""
        self._receive = None
        self._before.clear()
        self._times.clear()

    def finish_forward(self) -> None:
        """Ends one forward pass: every FFN must have run exactly once.

        Raises:
            MeasurementError: for an FFN that did not run, or ran more than once.
        """
        for index in range(len(self.ffns)):
            if self._times[index] != 1:
                raise MeasurementError(
                    "Each FFN must run exactly once in a measured forward pass; "
                    f"{self._named(index)} appeared {self._times[index]} times. Compiled models "
                    "must be measured through the module that was compiled."
                )
        self._times.clear()

    def take(self, index: int, inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor) -> None:
        """What the taps call with features, and a sample of pre as it was when it appeared;
        nothing happens while stopped.

        Raises:
            MeasurementError: for features that are not those of the FFN.
        """
        if self._receive is None:
            return
        if any(isinstance(parameter, DTensor) for parameter in self.ffns[index].pre.parameters()):
            raise self._split(index)  # the features are a slice, which no type shows
        if not torch.allclose(sample_of(pre), sample, rtol=0, atol=0, equal_nan=True):
            raise MeasurementError(
                "A nonlinearity must leave its input as it is; that of "
                f"{self._named(index)} overwrites it. Use one with inplace=False."
            )
        self._times[index] += 1
        self._receive(index, inputs, pre, post)

    # Everything is tapped once post is there: a tap of pre alone, ahead of the nonlinearity, would
    # make compiled code keep more for the backward pass than it keeps without.

    def _hook_pre(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self._receive is not None:
                before = self._checked(index, "input", inputs[0] if inputs else None)
                pre = self._checked(index, "pre", output)
                self._before[index] = (before, pre, sample_of(pre).clone())

        return hook

    def _hook_post(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._receive is not None:
                if index not in self._before:
                    raise MeasurementError(
                        f"Post must follow pre; of {self._named(index)} it comes first. Check "
                        "which modules its description names."
                    )
                before, pre, sample = self._before.pop(index)
                post = self._checked(index, "post", inputs[0] if inputs else None)
                _tap(before, pre, post, sample, self._order, self._number, index)

        return hook

    def _checked(self, index: int, site: str, features: Any) -> Tensor:
        if isinstance(features, DTensor):
            raise self._split(index)
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise MeasurementError(
                f"Features must be one tensor of floats; {site} of {self._named(index)} is "
                f"{type(features).__name__}. Give the modules whose output (pre) and first "
                "positional input (post) are the features."
            )
        return features.detach()

    def _split(self, index: int) -> MeasurementError:
        return MeasurementError(
            "Features must be whole, since the spectra of slices do not add up; those of "
            f"{self._named(index)} are split over processes by tensor parallelism. Train with "
            "data parallelism or FSDP."
        )

    def _named(self, index: int) -> str:
        return f"{self.ffns[index].name} in layer {self.ffns[index].layer}"


def is_tap(hook: object) -> bool:
    """Whether a hook of a module is a probe's, which looks at features and leaves them."""
    return getattr(hook, "__module__", None) == __name__


def sample_of(features: Tensor) -> Tensor:
    """Some of the samples, from all over them."""
    rows = features.reshape(-1, features.shape[-1])
    return rows[:: max(1, len(rows) // SAMPLES)]


_numbers = count()
_probes: WeakValueDictionary[int, Probe] = WeakValueDictionary()


@torch.library.custom_op("nerve::tap", mutates_args={"order"})
def _tap(
    inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor, order: Tensor, probe: int, index: int
) -> None:
    """Gives features to a probe: an operator, so that compiled code holds it as it is.

    It is said to change `order`, so that the compiler neither drops nor reorders it.
    """
    _probes[probe].take(index, inputs, pre, post, sample)


@_tap.register_fake
def _(
    inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor, order: Tensor, probe: int, index: int
) -> None:
    """Tracing taps nothing."""
