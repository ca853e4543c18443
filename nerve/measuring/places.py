"""The place of an FFN in its model: its layer, and its name within the layer."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import nn

from nerve.measuring.ffns import forward_of
from nerve.measuring.slices import Slice

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

_Path = tuple[str, ...]


class Place(NamedTuple):
    """The layer, from 0 along the depth of its stack, and the name of an FFN in it."""

    layer: int
    name: str


class Tree:
    """A model's modules as a tree.

    A block is an item of a container (ModuleList, Sequential, ModuleDict), the innermost one of
    which several items have FFNs. Blocks are numbered in the order in which they run, also across
    stages, which are containers in a row. Other siblings that have blocks of their own, such as an
    encoder and a decoder, are stacks: each begins at 0, and gives its name to its FFNs.

    Attributes:
        paths: the path of each module.

    Args:
        slices: matrices of parameters, placed in the module that has the parameter.
    """

    def __init__(self, model: nn.Module, slices: Iterable[Slice] = ()) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self._modules = {_parts(path): module for module, path in self.paths.items()}
        for each in slices:
            path = self.paths[each.holder]
            self.paths[each] = f"{path}.{each.label}" if path else each.label

    def holder(self, modules: Sequence[nn.Module]) -> str:
        """The path of the smallest module that holds all of these."""
        return ".".join(self._holder(modules))

    def module(self, path: str) -> nn.Module:
        """The module at a path."""
        return self._modules[_parts(path)]

    def runs(self, path: str) -> str:
        """The path of the smallest module at or around this path that runs as a whole, which a list
        does not."""
        parts = _parts(path)
        while parts and forward_of(self._modules[parts]) is nn.Module.forward:
            parts = parts[:-1]
        return ".".join(parts)

    def places(
        self,
        ffns: Sequence[Sequence[nn.Module]],
        names: Sequence[str | None],
        is_sure: Sequence[bool],
    ) -> list[Place]:
        """The places of FFNs, in the order in which they run.

        Args:
            ffns: the modules of each.
            names: fixed names of some FFNs, whatever else their block contains.
            is_sure: whether each is known to be an FFN; the others are numbered like these, but do
                not change their names.
        """
        holders = [self._holder(modules) for modules in ffns]
        bearing: dict[_Path, set[_Path]] = defaultdict(set)
        for holder in holders:
            for depth in range(len(holder)):
                bearing[holder[:depth]].add(holder[: depth + 1])
        shared = Counter(holders)
        keys, layers, numbers = [], [], defaultdict[str, dict[tuple[_Path, int], int]](dict)
        for index, holder in enumerate(holders):
            block = self._block(holder, bearing)
            stack = self._stack(block, bearing)
            # FFNs that lie bare in one Sequential follow one another in depth.
            bare = shared[holder] > 1 and isinstance(self._modules[holder], nn.Sequential)
            key = (block, index if bare else -1)
            layers.append(numbers[stack].setdefault(key, len(numbers[stack])))
            keys.append((stack, key))
        n_sure = Counter(key for key, sure in zip(keys, is_sure, strict=True) if sure)
        n_all = Counter(keys)
        places: dict[int, Place] = {}
        for index in sorted(range(len(ffns)), key=lambda index: not is_sure[index]):
            (stack, (block, _)), holder = keys[index], holders[index]
            name = names[index] or "ffn"
            beside = n_sure if is_sure[index] else n_all
            if names[index] is None and beside[keys[index]] > 1:
                inside = holder[len(block) :] or _parts(self.paths[ffns[index][0]])[len(block) :]
                name = "_".join(inside)
            name = f"{stack}_{name}" if stack else name
            place, n = Place(layers[index], name), 2
            while place in places.values():
                place, n = Place(layers[index], f"{name}_{n}"), n + 1
            places[index] = place
        return [places[index] for index in range(len(ffns))]

    def _holder(self, modules: Sequence[nn.Module]) -> _Path:
        paths = [_parts(self.paths[module])[:-1] for module in modules]
        depth = 0
        while all(len(path) > depth and path[depth] == paths[0][depth] for path in paths):
            depth += 1
        return paths[0][:depth]

    def _block(self, holder: _Path, bearing: dict[_Path, set[_Path]]) -> _Path:
        items = [
            holder[:depth]
            for depth in range(len(holder), 0, -1)
            if isinstance(self._modules[holder[: depth - 1]], _CONTAINERS)
        ]
        several = [item for item in items if len(bearing[item[:-1]]) > 1]
        return (several or items or [holder])[0]

    def _stack(self, block: _Path, bearing: dict[_Path, set[_Path]]) -> str:
        return "_".join(
            block[depth - 1]
            for depth in range(1, len(block))
            if len(bearing[block[: depth - 1]]) > 1
            and not isinstance(self._modules[block[:depth]], _CONTAINERS)
            and not isinstance(self._modules[block[: depth - 1]], _CONTAINERS)
        )


def _parts(path: str) -> _Path:
    return tuple(path.split(".")) if path else ()
