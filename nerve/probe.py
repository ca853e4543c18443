"""Finds the feed-forward networks (FFNs) of a model and taps their features while it runs.

A probe knows modules and tensors' names, nothing of covariance or metrics: what it taps goes to the
`receive` function that it is given, as it appears, so that no activation is kept.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from nerve.errors import MeasurementError

Site = Literal["input", "pre", "post"]
"""Where features are tapped: what the FFN gets, before and after its nonlinearity."""


@runtime_checkable
class FFN(Protocol):
    """What the measurement must know of an FFN: its place, and the modules around its nonlinearity.

    A module of a model fulfils it by having these attributes; for a model that has not, pass
    `FFNAdapter`s.
    """

    @property
    def layer(self) -> int:
        """Index of the block, from 0."""

    @property
    def name(self) -> str:
        """Which FFN of the block: `ffn`, `token_mixing`, `channel_mixing`, …"""

    @property
    def pre(self) -> nn.Module:
        """The module whose output is the pre-activation (up; gate where gated)."""

    @property
    def post(self) -> nn.Module:
        """The module whose input is the post-activation (down)."""


@dataclass(frozen=True)
class FFNAdapter:
    """Describes one FFN of a model that does not fulfil the `FFN` protocol itself.

    For a GPT-2 of Hugging Face: `FFNAdapter(i, "ffn", block.mlp.c_fc, block.mlp.c_proj)`.
    """

    layer: int
    name: str
    pre: nn.Module
    post: nn.Module


def find_ffns(model: nn.Module, layers: Collection[int] | None = None) -> list[FFN]:
    """The FFNs among a model's modules, by layer, in the order in which the model lists them.

    Args:
        model: whose modules fulfil `FFN`.
        layers: the layers to take; None for all.

    Raises:
        MeasurementError: if there is none, if two share layer and name, or if one of `layers` has
            none.
    """
    found: list[FFN] = [module for module in model.modules() if isinstance(module, FFN)]
    if not found:
        raise MeasurementError(
            f"A model to measure needs FFNs with attributes layer, name, pre and post; "
            f"{type(model).__name__} has none. Describe them with nerve.probe.FFNAdapter."
        )
    doubled = [key for key, n in Counter((f.layer, f.name) for f in found).items() if n > 1]
    if doubled:
        raise MeasurementError(
            f"Layer and name must tell FFNs apart; (layer, name) = {doubled[0]} stands for several."
        )
    known = sorted({ffn.layer for ffn in found})
    unknown = sorted(set(layers or ()) - set(known))
    if unknown or (layers is not None and not layers):
        raise MeasurementError(
            f"Layers to measure must have FFNs, as {', '.join(map(str, known))} have; got "
            f"{', '.join(map(str, unknown)) or 'none'}."
        )
    chosen = [ffn for ffn in found if layers is None or ffn.layer in layers]
    return sorted(chosen, key=lambda ffn: ffn.layer)


Receive = Callable[[int, Site, Tensor], None]
"""Takes an FFN's index, the site and the features `[..., width]`, detached."""


class Probe:
    """Taps the features of FFNs in every forward pass between `start()` and `stop()`.

    Its hooks must be in place when a model is compiled: `install()` before the first call of
    compiled code. That code then exists in two versions, with the taps and without them, and
    starting and stopping chooses; a probe that is stopped costs nothing.

    Args:
        ffns: the FFNs to tap.
    """

    def __init__(self, ffns: Sequence[FFN]) -> None:
        self.ffns = ffns
        self._receive: Receive | None = None
        self._seen: Counter[tuple[int, Site]] = Counter()
        self._handles: list[RemovableHandle] = []
        # Compiled code can name a probe by a number alone.
        self._number = next(_numbers)
        self._order = torch.zeros(())
        _probes[self._number] = self

    def install(self) -> None:
        """Puts the hooks in place."""
        for index, ffn in enumerate(self.ffns):
            self._handles += [
                ffn.pre.register_forward_hook(self._tap_pre(index)),
                ffn.post.register_forward_pre_hook(self._tap_post(index)),
            ]

    def remove(self) -> None:
        """Takes the hooks away; allowed at any time."""
        self.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self, receive: Receive) -> None:
        """From now on calls `receive` with features as they appear; in the order input, pre, post
        for each FFN."""
        self._receive = receive

    def stop(self) -> None:
        """Stops tapping; allowed at any time."""
        self._receive = None
        self._seen.clear()

    def finish_forward(self) -> None:
        """Ends one forward pass: every FFN must have shown its features exactly once.

        Raises:
            MeasurementError: for an FFN that did not run, or ran more than once.
        """
        sites: tuple[Site, ...] = ("pre", "post")
        for index in range(len(self.ffns)):
            for site in sites:
                times = self._seen[index, site]
                if times != 1:
                    raise MeasurementError(
                        "Each FFN must run exactly once in a measured forward pass; "
                        f"{self._named(index, site)} appeared {times} times. Compiled models must "
                        "be measured through the module that was compiled."
                    )
        self._seen.clear()

    def take(self, index: int, site: Site, features: Tensor) -> None:
        """What the taps call with features; nothing happens while stopped."""
        if self._receive is None:
            return
        if any(isinstance(parameter, DTensor) for parameter in self.ffns[index].pre.parameters()):
            raise self._split(index, site)  # the features are a slice, which no type shows
        self._seen[index, site] += 1
        self._receive(index, site, features)

    def _show(self, index: int, site: Site, features: Any) -> None:
        if isinstance(features, DTensor):
            raise self._split(index, site)
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise MeasurementError(
                f"Features must be one tensor of floats; {self._named(index, site)} is "
                f"{type(features).__name__}. Give the modules whose output (pre) and first "
                "positional input (post) are the features."
            )
        _tap(features.detach(), self._order, self._number, index, site)

    def _split(self, index: int, site: Site) -> MeasurementError:
        return MeasurementError(
            "Features must be whole, since the spectra of slices do not add up; "
            f"{self._named(index, site)} is split over processes by tensor parallelism. Train with "
            "data parallelism or FSDP."
        )

    def _named(self, index: int, site: Site) -> str:
        return f"{site} of {self.ffns[index].name} in layer {self.ffns[index].layer}"

    def _tap_pre(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self._receive is not None:
                self._show(index, "input", inputs[0] if inputs else None)
                self._show(index, "pre", output)

        return hook

    def _tap_post(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._receive is not None:
                self._show(index, "post", inputs[0] if inputs else None)

        return hook


_numbers = count()
_probes: WeakValueDictionary[int, Probe] = WeakValueDictionary()


@torch.library.custom_op("nerve::tap", mutates_args={"order"})
def _tap(features: Tensor, order: Tensor, probe: int, index: int, site: str) -> None:
    """Gives features to a probe: an operator, so that compiled code holds it as it is.

    It is said to change `order`, so that the compiler neither drops nor reorders it.
    """
    _probes[probe].take(index, site, features)  # type: ignore[arg-type]


@_tap.register_fake
def _(features: Tensor, order: Tensor, probe: int, index: int, site: str) -> None:
    """Tracing taps nothing."""
