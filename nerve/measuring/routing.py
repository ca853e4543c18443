"""Which tokens an expert receives: rows of its mixture's input, in any order."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nerve.errors import MeasurementError
from nerve.measuring.ffns import argument, declared_widths, forward_of, last

_LISTS = (nn.ModuleList, nn.ModuleDict)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def origins(rows: Tensor, source: Tensor) -> tuple[Tensor, Tensor] | None:
    """The index of each of `rows` in `source`, by bitwise equality; None if one is not there.

    Equal rows of the source are used in order.

    Args:
        rows: `[n, width]`.
        source: `[m, width]`.

    Returns:
        The indices `[n]`; and for each row of the source, `[m]`, the id of its set of equal rows if
        only some of the set occur in `rows`; otherwise -1, because the choice among them is then
        irrelevant.
    """
    ours, theirs = _digest(rows), _digest(source.to(rows.dtype))
    (r, by_r), (s, by_s) = ours.sort(stable=True), theirs.sort(stable=True)
    begin, end = torch.searchsorted(s, r), torch.searchsorted(s, r, right=True)
    begin_of_ours = torch.searchsorted(r, r)
    at = begin + torch.arange(len(r), device=r.device) - begin_of_ours
    if bool((at >= end).any()):
        return None
    index = torch.empty_like(by_r)
    index[by_r] = by_s[at]
    if not torch.equal(_bits(rows), _bits(source.to(rows.dtype)[index])):
        return None
    partly = torch.full((len(s),), -1, device=s.device)
    n_ours = torch.searchsorted(r, s, right=True) - torch.searchsorted(r, s)
    n_theirs = torch.searchsorted(s, s, right=True) - torch.searchsorted(s, s)
    is_split = (n_ours > 0) & (n_ours < n_theirs)
    partly[by_s] = torch.where(is_split, torch.searchsorted(s, s), -1)
    return index, partly


def counted_of(rows: Tensor, source: Tensor, counts: Tensor, where: str) -> Tensor:
    """Which of an expert's rows count.

    Args:
        rows: its input, `[*samples, width]`.
        source: the input of its mixture, `[*tokens, width]`.
        counts: which of those tokens count, bool, flattened.
        where: the FFN, for messages.

    Raises:
        MeasurementError: for rows that are not in the source, or for equal rows of which only some
            count and the expert received only some.
    """
    given, tokens = rows.reshape(-1, rows.shape[-1]), source.reshape(-1, source.shape[-1])
    found = origins(given, tokens) if given.shape[-1] == tokens.shape[-1] else None
    if found is None:
        raise MeasurementError(
            "With a mask or skip_first=, an expert must receive tokens exactly as its mixture "
            f"received them; {where} receives others, {tuple(rows.shape)} of "
            f"{tuple(source.shape)}. Give batches without padding, and leave skip_first out."
        )
    index, partly = found
    is_unclear = partly >= 0
    numbers, sets = partly[is_unclear].unique(return_inverse=True)
    n, n_counted = (
        each.bincount(minlength=len(numbers)) for each in (sets, sets[counts[is_unclear]])
    )
    if bool(((n_counted > 0) & (n_counted < n)).any()):
        raise MeasurementError(
            f"{where} received some of several identical tokens, of which only some count, so it "
            "cannot be determined which ones it received. Give batches without padding."
        )
    return counts[index].reshape(rows.shape[:-1])


def fillers_of(rows: Tensor, source: Tensor | None, where: str) -> Tensor | None:
    """Which of an expert's rows are no tokens but fill it up to its capacity: rows of zeros, which
    its mixture has not received. None if there are none.

    Args:
        rows: its input, `[*samples, width]`.
        source: the input of its mixture, `[*tokens, width]`; None if it is unknown.
        where: the FFN, for messages.

    Raises:
        MeasurementError: if the mixture has received rows of zeros, too, but fewer.
    """
    are_zero = ~rows.any(-1)
    n = int(are_zero.sum())
    if not n:
        return None
    n_given = 0 if source is None else int((~source.any(-1)).sum())
    if n_given >= n:
        return None
    if n_given:
        raise MeasurementError(
            f"Rows of zeros that fill up an expert must not count; {where} received {n} of them, "
            f"and its mixture {n_given}, so it cannot be determined which ones are tokens. Set the "
            "model to route tokens without a capacity."
        )
    return are_zero


def _bits(rows: Tensor) -> Tensor:
    return rows.detach().contiguous().view(_BITS[rows.element_size()])


def _digest(rows: Tensor) -> Tensor:
    """A 64-bit number for each row, computed from its bits."""
    bits = _bits(rows).long()
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator) * 2 + 1
    return (bits * odd.to(rows.device)).sum(-1)


@dataclass
class _Entry:
    """What an item of a list has received first: its features, and the number of rows if these are
    rows of the module around the list."""

    features: Tensor
    n_found: int | None


Reaches = Callable[[Tensor, Collection[nn.Module]], bool]
"""Whether a tensor depends on the output of one of these projections."""

_MOST_PROJECTIONS = 3
"""Those of an expert; a list of larger items may be one of towers."""


class Routing:
    """Finds lists whose modules stand beside one another and each receive tokens of the module
    around them: experts, not blocks.

    Attributes:
        mixtures: for each list, the module that receives the tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.mixtures: dict[nn.Module, nn.Module] = {}
        self._around = {
            module: outer
            for module, outer in _with_outer(model)
            if isinstance(module, _LISTS) and len(module) > 1
        }
        self._given: dict[nn.Module, Tensor | None] = {}
        self._entered: dict[nn.Module, dict[nn.Module, _Entry | None]] = {}

    def install(
        self, projections: Callable[[nn.Module], list[nn.Module]], reaches: Reaches
    ) -> list[RemovableHandle]:
        """Watches forward passes, until the handles are removed.

        Args:
            projections: returns the projections in a module.
            reaches: tells what depends on their outputs.
        """
        handles: list[RemovableHandle] = []
        for of_list, outer in self._around.items():
            inside = {item: projections(item) for item in of_list.children()}
            handles += [
                outer.register_forward_pre_hook(self._enter(of_list), with_kwargs=True),
                outer.register_forward_hook(self._leave(of_list, inside, reaches)),
            ]
            for item, modules in inside.items():
                for each in modules:
                    hook = self._take(of_list, item)
                    handles.append(each.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def _enter(self, of_list: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = argument(args, kwargs)
            is_given = isinstance(given, Tensor) and given.is_floating_point()
            self._given[of_list] = given if is_given else None
            self._entered[of_list] = {}

        return hook

    def _take(self, of_list: nn.Module, item: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            entered, source = self._entered.get(of_list, {}), self._given.get(of_list)
            if item in entered or source is None:
                return
            x = argument(args, kwargs)
            entered[item] = None  # if it has no rows of features
            widths = declared_widths(module)
            if not isinstance(x, Tensor) or widths is None or x.ndim == 0:
                return
            rows, found = last(x, widths.axis).reshape(-1, widths.d_in), None
            if source.shape[-1] == widths.d_in and source.element_size() in _BITS:
                found = origins(rows, source.reshape(-1, source.shape[-1]))
            entered[item] = _Entry(rows, None if found is None else len(rows))

        return hook

    def _leave(
        self, of_list: nn.Module, inside: Mapping[nn.Module, list[nn.Module]], reaches: Reaches
    ) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            source, entered = self._given.pop(of_list, None), self._entered.pop(of_list, {})
            if source is None or not entered:
                return
            entries = [each for each in entered.values() if each is not None]
            if len(entries) < len(entered):
                return
            n_tokens = source.shape[:-1].numel()
            are_parts = all(each.n_found is not None for each in entries)
            is_idle = len(entered) < len(inside)
            if (are_parts and (is_idle or any(each.n_found != n_tokens for each in entries))) or (
                _are_received(entries, n_tokens) and _are_beside(entered, inside, reaches)
            ):
                self.mixtures[of_list] = module

        return hook


def _are_received(entries: Sequence[_Entry], n_tokens: int) -> bool:
    """Whether several items have received what blocks that follow one another do not: other numbers
    of samples, all the same, or the same ones apart from zeros."""
    rows = [each.features.detach() for each in entries]
    if len(rows) < 2 or any(each.shape[-1] != rows[0].shape[-1] for each in rows):
        return False
    if any(len(each) != n_tokens for each in rows):
        return True
    whole = torch.stack(rows).abs().amax(0)
    return all(bool(((each == 0) | (each.abs() == whole)).all()) for each in rows)


def _are_beside(
    entered: Mapping[nn.Module, _Entry | None],
    inside: Mapping[nn.Module, list[nn.Module]],
    reaches: Reaches,
) -> bool:
    """Whether no item's input depends on the output of another one."""
    if any(len(inside[item]) > _MOST_PROJECTIONS for item in entered):
        return False
    modules = {module for item in entered for module in inside[item]}
    return not any(reaches(each.features, modules) for each in entered.values() if each is not None)


def _with_outer(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Each module with the smallest module that contains it (or is it) and runs as a whole."""
    found: list[tuple[nn.Module, nn.Module]] = []

    def walk(module: nn.Module, outer: nn.Module) -> None:
        runs = forward_of(module) not in (nn.ModuleList.forward, nn.ModuleDict.forward)
        outer = module if runs else outer
        found.append((module, outer))
        for child in module.children():
            walk(child, outer)

    walk(model, model)
    return found
