"""Whether post follows from pre with no matrix in between, as autograd records it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nerve.measuring.checks import check_follows, check_is_no_factor, plain
from nerve.measuring.sites import Site

ENOUGH = 64
"""With so many samples an FFN is known; fewer may look like what they are not."""


class Following:
    """Lets autograd record what happens between pre and post of each FFN, until it is known: at its
    first run, and where that was of few samples at those that follow.

    Gradients are off elsewhere: they are turned on when pre appears and off when post is there.
    Where a model trains, its own graph is looked at. Inference mode does not allow for that, and is
    left for the forward passes that it takes; of compiled code nothing can be seen.

    Args:
        described: indices of the FFNs for which inference mode is left: those that are not modules
            of the model, which says itself what they are.
    """

    def __init__(self, described: Iterable[int]) -> None:
        self._described = set(described)
        self._known: set[int] = set()
        self._recording: set[int] = set()
        self._outside: Any = None

    def start_forward(self) -> None:
        """Leaves inference mode, where there is an FFN that is not known."""
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
        """What the model goes on with in place of pre, and whether it is another tensor: one that
        autograd records from now on, where that was never seen and does not disturb.

        Args:
            index: of the FFN.
            tensor: what holds pre.
            where: for messages.
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
        """`tensor`, which holds pre, where what follows from it is to be checked."""
        if torch.compiler.is_compiling() or index in self._known or tensor.grad_fn is None:
            return None
        return tensor

    def end(self, index: int, pre: Tensor | None, post: Any, site: Site, where: str) -> bool:
        """Checks that post follows from pre; whether autograd has recorded it for that alone.

        Args:
            index: of the FFN.
            pre: as `recorded` gave it.
            post: what holds post.
            site: of pre.
            where: for messages.

        Raises:
            MeasurementError: where it does not, or where pre is what it is multiplied with.
        """
        is_ours = not torch.compiler.is_compiling() and index in self._recording
        if is_ours:
            self._recording.discard(index)
            torch.set_grad_enabled(bool(self._recording))
        if pre is not None:
            check_follows(pre, post, where)
            if is_ours:
                check_is_no_factor(pre, post, site, where)
            if pre.numel() >= ENOUGH * pre.shape[site.feature_axis]:
                self._known.add(index)
        return is_ours

    def finish_forward(self) -> None:
        """Ends a forward pass that came to its end."""
        if self._recording:
            torch.set_grad_enabled(False)
        if self._outside is not None:
            self._outside.__exit__(None, None, None)
            _OPEN.remove(self._outside)
        self.forget()

    def forget(self) -> None:
        """Ends a forward pass, however it went.

        Gradients stay: whatever turned them off has turned them on again where an error has led
        here, and else the forward pass was finished.
        """
        self._recording.clear()
        self._outside = None


_OPEN: list[Any] = []
"""Inference modes that were left, and not yet entered again. One that an error has ended stays: to
let go of it would enter it again."""
