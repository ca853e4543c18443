"""The loss in what a forward pass gives, where there is one."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def loss_of(output: Any) -> tuple[Tensor, int | None] | None:
    """The mean loss and the number of targets that it is of, None where that is not said; None
    where the model gives no loss.

    Args:
        output: what a model returned. The loss is the entry or attribute `loss`, a tensor with one
            element, as models of transformers have it; `n_targets` beside it is how much it counts
            among the batches, which without it count alike.
    """
    loss = _entry(output, "loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    n_targets = _entry(output, "n_targets")
    return loss.detach().reshape(()), None if n_targets is None else int(n_targets)


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
