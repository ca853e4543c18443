"""What an optimizer's step is given to compute the loss anew."""

from collections.abc import Callable
from typing import Any

import torch


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What `closure` gives, run with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
