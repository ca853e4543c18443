"""From a model and batches to the spectra of each of its FFNs, in one call."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import pandas as pd
from torch import Tensor, nn

from nerve.derived import sampling, with_derived
from nerve.measuring.around import find_streams, sites_around
from nerve.measuring.choice import Choice, call_measured, call_probed
from nerve.measuring.eigenproblem import ROW, FFNSpectra, GroupSpectrum
from nerve.measuring.ffns import FFN, sites_of
from nerve.measuring.find import find_ffns
from nerve.measuring.forward import evaluating
from nerve.measuring.found import FoundFFNs
from nerve.measuring.groups import NOT_GROUPED, Grouped
from nerve.measuring.masks import Masks, for_each
from nerve.measuring.measurement import Measurement, Pools
from nerve.measuring.passes import passes
from nerve.measuring.probe import Probe
from nerve.measuring.slices import products_of
from nerve.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class How:
    """How a model is measured: as `nerve.measure` takes it."""

    forward: Callable[[nn.Module, Any], object]
    mask: Callable[[Any], Masks] | None
    exclude: tuple[int, ...]
    only_labeled: bool
    skip_first: int
    shortcut: bool | str
    grouped: Grouped = NOT_GROUPED
    sites: tuple[str, ...] = ()


def spectra_of(
    model: nn.Module,
    batches: Iterable[Any],
    how: How,
    *,
    ffns: Sequence[FFN] | None,
    memory: int | str | None,
    progress: Progress,
    give: Callable[[Any, object], None],
) -> tuple[list[FFNSpectra], list[GroupSpectrum]]:
    """The solved spectra of a model's FFNs over batches, and those of groups and sites.

    Args:
        model, batches, ffns, memory: as in `nerve.measure`.
        how: its other arguments.
        progress: receives the progress of batches and eigenproblems.
        give: receives each batch once, with the output of the model.

    Raises:
        MeasurementError: for a model without FFNs, no batches, or features, masks or descriptions
            that are inconsistent.
    """
    with evaluating(model), ExitStack() as stack:
        first: list[Any] = []
        if ffns is None or how.sites:
            first, batches = _first_of(batches)
        if ffns is None:
            ffns = _found(model, first[0] if first else None, how)
        around = sites_around(
            ffns,
            how.sites,
            partial(find_streams, model, ffns, lambda: [how.forward(model, x) for x in first]),
        )
        plan = passes(ffns, model, memory, how.grouped.n_matrices)
        if len(plan) > 1 and iter(batches) is batches:
            batches = list(batches)
        pools: Pools = {}
        spectra: list[FFNSpectra] = []
        groups: list[GroupSpectrum] = []
        # The model behaves the same in each pass, even for experts outside of the pass.
        for products in products_of(sites_of(ffn) for ffn in ffns):
            for handle in products.install(lambda: True):
                stack.callback(handle.remove)
        for number, planned in enumerate(plan):
            sites = [around[index] for index in planned.indices] if how.sites else None
            probe = Probe([ffns[index] for index in planned.indices], sites)
            measurement = Measurement(
                probe,
                shortcut=how.shortcut,
                skip_first=how.skip_first,
                pools=pools,
                open_pools=planned.open_pools,
                grouped=how.grouped,
                sites=how.sites,
            )
            some = replace(how, mask=_of_some(how.mask, ffns, planned.indices))
            which = "" if len(plan) == 1 else f", pass {number + 1} of {len(plan)}"
            _run(
                model,
                _reporting(batches, f"batches{which}", progress),
                some,
                probe,
                measurement,
                give if number == 0 else lambda batch, output: None,
            )
            spectra += measurement.spectra(progress)
            groups += [each.solve() for each in measurement.group_eigenproblems()]
    return spectra, groups


def _found(model: nn.Module, batch: Any, how: How) -> FoundFFNs:
    """The FFNs that a forward pass shows; logs them and candidates that may be FFNs."""
    found = find_ffns(model, batch, forward=how.forward)
    log.info("FFNs to measure:\n%s", str(found))  # a stored log record would keep the model
    found.warn()
    return found


def _run(
    model: nn.Module,
    batches: Iterable[Any],
    how: How,
    probe: Probe,
    measurement: Measurement,
    give: Callable[[Any, object], None],
) -> None:
    """Measures all batches once."""

    def run(batch: Any) -> object:
        return call_probed(probe, how.forward, model, batch)

    counted = (how.mask, how.exclude, how.only_labeled)
    choice = Choice(model, probe, run, *counted, how.skip_first, how.grouped.groupings)
    probe.install()
    try:
        for batch in batches:
            measurement.start(choice.of(batch))
            output = call_measured(probe, choice, how.forward, model, batch)
            measurement.finish_forward()
            give(batch, output)
        measurement.require_positions()
    finally:
        probe.remove()


def _reporting(batches: Iterable[Any], what: str, progress: Progress) -> Iterator[Any]:
    """The batches, reporting to `progress`."""
    n_batches = len(batches) if isinstance(batches, Sized) else None
    for done, batch in enumerate(batches):
        progress(what, done, n_batches)
        yield batch


def frame_of(spectra: Iterable[FFNSpectra]) -> pd.DataFrame:
    """One row per FFN, with the derived columns of `nerve.load_metrics`. `sampling` is the verdict
    from N/D. Without spectra, the same columns, of the same types."""
    rows = pd.DataFrame([each.row() for each in spectra], columns=[*ROW]).astype(dict(ROW))
    return with_derived(rows).assign(sampling=sampling(rows))


def _first_of(batches: Iterable[Any]) -> tuple[list[Any], Iterable[Any]]:
    """The first batch, if any, and an iterable of all batches."""
    iterator = iter(batches)
    first = list(islice(iterator, 1))
    return first, chain(first, iterator) if iterator is batches else batches


def _of_some(
    mask: Callable[[Any], Masks] | None, ffns: Sequence[FFN], indices: Sequence[int]
) -> Callable[[Any], Masks] | None:
    """A mask function for some of the FFNs, given one for all."""

    if mask is None or len(indices) == len(ffns):
        return mask

    def of_some(batch: Any) -> Masks:
        given = mask(batch)
        if given is None or isinstance(given, Tensor):
            return given
        each = for_each(ffns, given)
        return [each[index] for index in indices]

    return of_some
