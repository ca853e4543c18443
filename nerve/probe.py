"""Finds the feed-forward networks (FFNs) of a model and taps their features while it runs.

A probe knows modules and tensors' names, nothing of covariance or metrics: what it taps goes to the
`receive` function that it is given, as it appears, so that no activation is kept.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
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


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFNs among a model's modules, by layer, in the order in which the model lists them.

    Raises:
        MeasurementError: if there is none, or if two share layer and name.
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
    return sorted(found, key=lambda ffn: ffn.layer)


class Probe:
    """Taps the features of FFNs in every forward pass between `attach()` and `detach()`.

    Args:
        ffns: the FFNs to tap.
        receive: called with the FFN's index in `ffns`, the site and the features `[..., width]`,
            each time they appear; in the order input, pre, post for each FFN.
    """

    def __init__(self, ffns: Sequence[FFN], receive: Callable[[int, Site, Tensor], None]) -> None:
        self.ffns = ffns
        self._receive = receive
        self._seen: Counter[tuple[int, Site]] = Counter()
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Starts tapping. An unattached probe costs the model nothing."""
        for index, ffn in enumerate(self.ffns):
            self._handles += [
                ffn.pre.register_forward_hook(self._tap_pre(index)),
                ffn.post.register_forward_pre_hook(self._tap_post(index)),
            ]

    def detach(self) -> None:
        """Stops tapping; allowed at any time."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def finish_forward(self) -> None:
        """Ends one forward pass: every FFN must have shown its features exactly once.

        Raises:
            MeasurementError: for an FFN that did not run, or ran more than once.
        """
        for index, ffn in enumerate(self.ffns):
            for site in ("pre", "post"):
                times = self._seen[index, site]
                if times != 1:
                    raise MeasurementError(
                        f"Each FFN must run exactly once in a measured forward pass; {site} of "
                        f"{ffn.name} in layer {ffn.layer} appeared {times} times. Compiled models "
                        "must be measured through the module that was compiled."
                    )
        self._seen.clear()

    def _take(self, index: int, site: Site, features: Any) -> None:
        if not isinstance(features, Tensor) or not features.is_floating_point():
            ffn = self.ffns[index]
            raise MeasurementError(
                f"Features must be one tensor of floats; {site} of {ffn.name} in layer {ffn.layer} "
                f"is {type(features).__name__}. Give the modules whose output (pre) and first "
                "positional input (post) are the features."
            )
        self._seen[index, site] += 1
        self._receive(index, site, features)

    def _tap_pre(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._take(index, "input", inputs[0] if inputs else None)
            self._take(index, "pre", output)

        return hook

    def _tap_post(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._take(index, "post", inputs[0] if inputs else None)

        return hook
