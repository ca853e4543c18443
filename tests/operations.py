"""Counts the operations that torch dispatches, without views and allocations, which launch
nothing."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

NOT_LAUNCHED = {
    *("_unsafe_view", "alias", "as_strided", "detach", "expand", "permute", "select", "slice"),
    *("split", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "empty", "new_empty"),
    *("diagonal", "numpy_T", "promote_types", "scalar_tensor", "_local_scalar_dense"),
}


class Operations(TorchDispatchMode):
    """Counts those within it."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0
        self.n_read = 0
        """Numbers that the host read, for which it waits if they are on a device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.n += name not in NOT_LAUNCHED
        self.n_read += name == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def count(work: Callable[[], object]) -> int:
    with Operations() as operations:
        work()
    return operations.n
