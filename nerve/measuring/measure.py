"""A model and batches to the spectra of each of its FFNs, in one go."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import pandas as pd
from torch import nn

from nerve.measuring.around import find_streams, sites_around
from nerve.measuring.choice import Choice, call_probed
from nerve.measuring.eigenproblem import FFNSpectra
from nerve.measuring.ffns import FFN
from nerve.measuring.find import find_ffns
from nerve.measuring.forward import call, evaluating
from nerve.measuring.group_spectra import GroupSpectrum
from nerve.measuring.groups import Grouped
from nerve.measuring.masks import Masks
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.outliers import outliers

log = logging.getLogger(__name__)


def spectra_of(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    ffns: Sequence[FFN] | None,
    forward: Callable[[nn.Module, Any], object] | None,
    mask: Callable[[Any], Masks] | None,
    exclude: Collection[int],
    only_labeled: bool,
    skip_first: int,
    shortcut: bool,
    grouped: Grouped,
    sites: Collection[str],
    give: Callable[[object], None],
) -> tuple[list[FFNSpectra], list[GroupSpectrum]]:
    """The spectra of a model's FFNs over batches, solved, and those of groups and sites.

    Args:
        grouped, sites: as `Measurement` takes them.
        give: gets what `forward` returned, for each batch.
        others: as `nerve.measure` takes them.

    Raises:
        MeasurementError: for a model without FFNs, no batches, or features, masks or descriptions
            that are not what they are said to be.
    """

    def run(batch: Any) -> object:
        return call_probed(probe, forward or call, model, batch)

    with evaluating(model):
        batches = iter(batches)
        first = list(_first(batches))
        batches = chain(first, batches)
        if ffns is None:
            found = find_ffns(model, first[0] if first else None, forward=forward)
            log.info("FFNs to measure:\n%s", found)
            for line in found.unclear:
                log.warning("not measured; by hand, if it is an FFN: %s", line)
            ffns = found
        known = ffns
        find = partial(
            find_streams, model, known, lambda: [(forward or call)(model, each) for each in first]
        )
        probe = Probe(known, sites_around(known, sites, find))
        measurement = Measurement(
            probe, shortcut=shortcut, skip_first=skip_first, grouped=grouped, sites=sites
        )
        is_grouped = bool(grouped.groupings)
        counted = (mask, tuple(exclude), only_labeled)
        choice = Choice(model, probe, run, *counted, skip_first > 0, is_grouped)
        probe.install()
        try:
            for batch in batches:
                measurement.start(*choice.of(batch))
                output = run(batch)
                measurement.finish_forward()
                give(output)
        finally:
            probe.remove()
    spectra = measurement.spectra()
    return spectra, [each.solve() for each in measurement.group_eigenproblems()]


def frame_of(spectra: Iterable[FFNSpectra]) -> pd.DataFrame:
    """One row an FFN, with the column `outliers`."""
    rows = pd.DataFrame([each.row() for each in spectra])
    rows = rows.astype({name: float for name in rows if rows[name].isna().all()})
    return rows.assign(outliers=outliers(rows))


def _first(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        yield batch
        return
