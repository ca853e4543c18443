"""When autograd records what happens between pre and post, so that it can be checked."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nerve.measuring.ffns import Site
from nerve.measuring.recorded import check_follows, check_is_no_factor, check_part
from nerve.measuring.tap import plain

ENOUGH = 64
"""With this many samples an FFN is known; with fewer, dependence may be misjudged."""


class Following:
    """Lets autograd record what happens between pre and post of each FFN until it is known: in its
    first run, and, if that had few samples, in later ones.

    Gradients are otherwise off: they are turned on when pre appears and off when post is there. In
    training, the model's own graph is inspected. Inference mode does not allow recording and is
    left for the forward passes that need it; compiled code cannot be inspected.

    Args:
        described: indices of the FFNs for which inference mode is left: those that are described
            by the caller and not modules of the model itself.
    """

    def __init__(self, described: Iterable[int]) -> None:
        self._described = set(described)
        self._known: set[int] = set()
        self._recording: set[int] = set()
        self._outside: Any = None

    def start_forward(self) -> None:
        """Leaves inference mode if there is an FFN that is not known."""
        if torch.is_inference_mode_enabled() and not self._described <= self._known:
            self._outside = torch.inference_mode(False)
            self._outside.__enter__()
            torch.set_grad_enabled(False)
            _OPEN.append(self._outside)

    @property
    def is_recording(self) -> bool:
        """Whether autograd records what happens between pre and post of an FFN."""
        return bool(self._recording)

    def begin(self, index: int, tensor: Any, where: str) -> tuple[Any, bool]:
        """The tensor with which the model continues in place of pre, and whether it is a new one:
        one that autograd records from now on, if the FFN is unknown and recording does not
        interfere.

        Args:
            index: the index of the FFN.
            tensor: the tensor that holds pre.
            where: the FFN, for messages.
        """
        if (
            torch.compiler.is_compiling()
            or index in self._known
            or torch.is_grad_enabled()
            or torch.is_inference_mode_enabled()
            or index in self._recording
        ):
            return tensor, False
        given = plain(tensor, "pre", where)
        self._recording.add(index)
        torch.set_grad_enabled(True)
        return given.requires_grad_().clone(), True

    def recorded(self, index: int, tensor: Tensor) -> Tensor | None:
        """`tensor`, which holds pre, if what depends on it is to be checked."""
        if torch.compiler.is_compiling() or index in self._known or tensor.grad_fn is None:
            return None
        return tensor

    def end(
        self,
        index: int,
        pre: Tensor | None,
        post: Any,
        inputs: Tensor,
        sites: tuple[Site, Site],
        where: str,
    ) -> bool:
        """Checks that post depends on pre; returns whether autograd was recording only for that.

        Args:
            index: of the FFN.
            pre: the result of `recorded`.
            post: the tensor that holds post.
            inputs: what the FFN gets, `[*samples, d_in]`.
            sites: the sites of pre and post.
            where: the FFN, for messages.

        Raises:
            MeasurementError: if it does not, if pre is the factor that multiplies, or if it is
                another part of a projection.
        """
        is_ours = not torch.compiler.is_compiling() and index in self._recording
        if is_ours:
            self._recording.discard(index)
            torch.set_grad_enabled(bool(self._recording))
        if pre is not None:
            site = sites[0]
            check_follows(pre, post, where)
            if is_ours:
                check_part(pre, post, sites, where)
                check_is_no_factor(pre, post, inputs, site, where)
            if pre.numel() >= ENOUGH * pre.shape[site.feature_axis]:
                self._known.add(index)
        return is_ours

    def finish_forward(self) -> None:
        """Ends a forward pass that completed."""
        if self._recording:
            torch.set_grad_enabled(False)
        if self._outside is not None:
            self._outside.__exit__(None, None, None)
            _OPEN.remove(self._outside)
        self.forget()

    def forget(self) -> None:
        """Ends a forward pass, however it went.

        The gradient mode is left alone: after an error, whatever turned gradients off has turned
        them on again, and otherwise the forward pass was finished.
        """
        self._recording.clear()
        self._outside = None


_OPEN: list[Any] = []
"""Inference modes that were left and not yet reentered. One that an error has ended is kept:
releasing it would reenter it."""
