"""Several optimizers that act as one."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nerve.errors import ConfigError
from nerve.optim.closure import evaluate_closure


class CombinedOptimizer(Optimizer):
    """Named optimizers over disjoint parameters behind the interface of one.

    `param_groups` lists the parts' own group dictionaries, so a scheduler that sets `group["lr"]`,
    gradient clipping and AMP act on the parts; `state` reads and writes theirs. A step runs the
    closure once and then each part's step in the given order, which has the same effect as the
    parts alone. No group can be added later.

    Attributes:
        parts: name to optimizer.

    Raises:
        ValueError: if two parts share a parameter (raised by torch).
    """

    parts: dict[str, Optimizer]

    def __init__(self, parts: Mapping[str, Optimizer]) -> None:
        groups = [group for part in parts.values() for group in part.param_groups]
        super().__init__(groups, defaults={})
        self.parts = dict(parts)
        self.state = _PartsState(self.parts)  # type: ignore[assignment]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs `closure` with gradients enabled, if given, and all parts; returns its loss."""
        loss = evaluate_closure(closure)
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """`{"parts": {name: its state_dict}}`."""
        return {"parts": {name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores each part from `state_dict()` of an optimizer with the same parts.

        Raises:
            ConfigError: if the parts' names differ.
        """
        saved = state_dict.get("parts", {})
        if list(saved) != list(self.parts):
            raise ConfigError(
                "A checkpoint must have the same parts as the optimizer; it has "
                f"{', '.join(saved) or 'none'}, and the optimizer has {', '.join(self.parts)}. "
                "Resume with the optimizer that wrote it."
            )
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        # Loading replaces the parts' group dictionaries.
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Always raises an error after construction, because a group must belong to a part.

        Raises:
            ConfigError: always, once constructed.
        """
        if hasattr(self, "parts"):
            raise ConfigError(
                "A combined optimizer takes no further parameter group; got one with "
                f"{', '.join(sorted(param_group))}. Give all parameters to its parts "
                f"({', '.join(self.parts)}) when they are built."
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        CombinedOptimizer.__init__(self, state["parts"])


class _PartsState(MutableMapping[Tensor, Any]):
    """The `state` of all parts as one mapping; an entry belongs to the part with its parameter."""

    def __init__(self, parts: Mapping[str, Optimizer]) -> None:
        self._parts = list(parts.values())
        self._owners = {
            parameter: part
            for part in self._parts
            for group in part.param_groups
            for parameter in group["params"]
        }

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._owners[parameter].state[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self._owners[parameter].state[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self._owners[parameter].state[parameter]

    def __contains__(self, parameter: object) -> bool:
        # Not with __getitem__: a part's state is a defaultdict, which would create the entry.
        return any(parameter in part.state for part in self._parts)

    def __iter__(self) -> Iterator[Tensor]:
        return chain.from_iterable(part.state for part in self._parts)

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)
