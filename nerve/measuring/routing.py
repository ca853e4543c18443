"""Which tokens an expert receives: rows of its mixture's input, in any order."""

from collections.abc import Callable, Mapping
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


def _bits(rows: Tensor) -> Tensor:
    return rows.detach().contiguous().view(_BITS[rows.element_size()])


def _digest(rows: Tensor) -> Tensor:
    """A 64-bit number for each row, computed from its bits."""
    bits = _bits(rows).long()
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator) * 2 + 1
    return (bits * odd.to(rows.device)).sum(-1)


class Routing:
    """Finds lists whose modules each receive some of the tokens of the module around them: experts,
    not blocks.

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
        self._entered: dict[nn.Module, dict[nn.Module, int | None]] = {}

    def install(self, projections: Callable[[nn.Module], list[nn.Module]]) -> list[RemovableHandle]:
        """Watches forward passes, until the handles are removed.

        Args:
            projections: returns the projections in a module.
        """
        handles: list[RemovableHandle] = []
        for of_list, outer in self._around.items():
            handles += [
                outer.register_forward_pre_hook(self._enter(of_list), with_kwargs=True),
                outer.register_forward_hook(self._leave(of_list)),
            ]
            for item in of_list.children():
                for each in projections(item):
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
            entered[item] = None  # if it is not a part of the source
            widths = declared_widths(module)
            if not isinstance(x, Tensor) or widths is None or x.ndim == 0:
                return
            rows = last(x, widths.axis).reshape(-1, widths.d_in)
            if source.shape[-1] == widths.d_in and source.element_size() in _BITS:
                found = origins(rows, source.reshape(-1, source.shape[-1]))
                entered[item] = None if found is None else len(rows)

        return hook

    def _leave(self, of_list: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            source, entered = self._given.pop(of_list, None), self._entered.pop(of_list, {})
            if source is None or not entered:
                return
            n_tokens = source.shape[:-1].numel()
            counts = list(entered.values())
            are_parts = all(n is not None for n in counts)
            is_idle = len(entered) < len(list(of_list.children()))
            if are_parts and (is_idle or any(n != n_tokens for n in counts)):
                self.mixtures[of_list] = module

        return hook


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
