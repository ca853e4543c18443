"""Turns solved measurements into rows of a run, and into named values for loggers, callbacks and
sweepers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from nerve.measuring.eigenproblem import FFNSpectra
from nerve.metric_names import MEASURED
from nerve.recording.solver import Solved
from nerve.storage.store import RunStore

LARGEST_D_FF_FOR_SPECTRA = 1024
"""Up to this width `spectra="auto"` stores the eigenvalues (4 KiB per layer and site)."""


class Logger(Protocol):
    """A receiver of each measurement besides the store, such as a Lightning logger."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Receives the named values of a step."""

    def save(self) -> None:
        """Writes what it has received."""


class SpectraWriter:
    """Writes solved measurements to the run, and passes them to loggers.

    Args:
        store: where rows go; flushed after each measurement. None in a process that does not write.
        loggers: receive each measurement with its own step.
        spectra: whether to store eigenvalues, too; `auto` for d_ff up to 1024.
    """

    def __init__(
        self,
        store: RunStore | None,
        loggers: Sequence[Logger],
        spectra: bool | str,
    ) -> None:
        self.latest: list[dict[str, Any]] = []
        """The rows of the last measurement that was written."""
        self.store = store
        """Where rows go; may be set until the first measurement is written."""
        self._loggers = loggers
        self._spectra = spectra

    def write(self, solved: Iterable[Solved]) -> None:
        """Writes measurements as they come. Without a store it only iterates over them, which every
        process must do because the processes exchange data between them."""
        for measured in solved:
            if self.store is None:
                continue
            step = measured.labels["step"]
            self.latest = measured.rows
            self.store.append_metrics(self.latest)
            self.store.append_groups(measured.group_rows)
            for spectra in measured.spectra:
                if self._stores(spectra):
                    self.store.append_spectra(_spectra_rows(step, spectra))
            self.store.flush(step)
            values = logged_values(self.latest)
            for logger in self._loggers if values else ():
                logger.log_metrics(values, step)
                logger.save()

    def _stores(self, spectra: FFNSpectra) -> bool:
        if self._spectra == "auto":
            return spectra.d_ff <= LARGEST_D_FF_FOR_SPECTRA
        return bool(self._spectra)


def _spectra_rows(step: int, spectra: FFNSpectra) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "layer": spectra.layer,
            "ffn": spectra.ffn,
            "site": site,
            "eigenvalues": spectrum.cpu().numpy(),
        }
        for site, spectrum in (("pre", spectra.pre), ("post", spectra.post))
        if spectrum.isfinite().all()  # otherwise nothing was measured, and the row's status says so
    ]


Rows = Iterable[Mapping[str, Any]]


def mean_name(ffn: str, metric: str) -> str:
    """`ffn/mean/pr_post`: the mean of a metric over the layers of an FFN."""
    return f"{ffn}/mean/{metric}"


def mean_values(rows: Rows) -> dict[str, float]:
    """Averages each metric: `pr_post` over all FFNs, `ffn/mean/pr_post` over the layers of `ffn` (a
    Mixer has `token_mixing/mean/pr_post` and `channel_mixing/mean/pr_post`).

    FFNs where nothing could be measured are left out; NaN if none remain.

    Args:
        rows: the rows of one measurement, as in the `metrics` table; rows of earlier versions lack
            columns.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        for metric in MEASURED:
            for name in (metric, mean_name(row["ffn"], metric)):
                values = found.setdefault(name, [])
                if _is_there(row.get(metric)):
                    values.append(row[metric])
    return {
        name: math.fsum(values) / len(values) if values else math.nan
        for name, values in found.items()
    }


def layer_name(ffn: str, layer: int, metric: str) -> str:
    """`ffn/03/pr_post`: a metric of one layer."""
    return f"{ffn}/{layer:02d}/{metric}"


def monitored_values(rows: Rows) -> dict[str, float]:
    """The values that callbacks can monitor: the means of `mean_values`, and each metric of each
    layer, `ffn/03/pr_post`; NaN where nothing could be measured."""
    rows = list(rows)
    layers = {
        layer_name(row["ffn"], row["layer"], metric): row.get(metric)
        for row in rows
        for metric in MEASURED
    }
    return mean_values(rows) | {
        name: math.nan if value is None else value for name, value in layers.items()
    }


def is_measured(name: object) -> bool:
    """Whether this is the name of one of `monitored_values`, whatever the layers of the model."""
    return str(name).rpartition("/")[-1] in MEASURED


def logged_values(rows: Rows) -> dict[str, float]:
    """The values that loggers receive: each metric of each layer, `ffn/03/pr_post`, and its mean,
    `ffn/mean/pr_post`.

    Values that could not be measured are left out.

    Args:
        rows: the rows of one measurement, as in the `metrics` table.
    """
    values = monitored_values(rows)
    return {
        name: value for name, value in values.items() if name not in MEASURED and _is_there(value)
    }


def _is_there(value: float | None) -> bool:
    return value is not None and not math.isnan(value)
