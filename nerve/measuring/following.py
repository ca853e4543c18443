"""Whether post follows from pre with no matrix in between, as autograd records it."""

from typing import Any

import torch
from torch import Tensor

from nerve.measuring.checks import check_follows, check_is_no_factor, plain
from nerve.measuring.sites import Site


class Following:
    """Lets autograd record what happens between pre and post of each FFN, at its first run alone.

    Gradients are off elsewhere: they are turned on when pre appears and off when post is there.
    Where a model trains, its own graph is looked at. Compiled code and inference mode do not allow
    for either.
    """

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._recording: set[int] = set()

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
            self._known.add(index)
        return is_ours

    def finish_forward(self) -> None:
        """Ends a forward pass that came to its end."""
        if self._recording:
            torch.set_grad_enabled(False)
        self.forget()

    def forget(self) -> None:
        """Ends a forward pass, however it went.

        Gradients stay: whatever turned them off has turned them on again where an error has led
        here, and else the forward pass was finished.
        """
        self._recording.clear()
