"""What becomes of measurements that are solved: rows of a run, and numbers for loggers."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from nerve.measuring.eigenproblem import FFNSpectra
from nerve.recording.means import logged_values
from nerve.recording.solver import Solved
from nerve.storage.store import RunStore

LARGEST_D_FF_FOR_SPECTRA = 1024
"""Up to this width `spectra="auto"` stores the eigenvalues (4 KiB per layer and site)."""


class Logger(Protocol):
    """What is given each measurement beside the store, such as a logger of Lightning."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Takes named numbers of a step."""

    def save(self) -> None:
        """Writes what it was given."""


class SpectraWriter:
    """Writes measurements that are solved to the run, and gives them to loggers.

    Args:
        store: where rows go; flushed after each measurement. None in a process that does not write.
        loggers: get each measurement with its own step.
        spectra: whether eigenvalues are stored beside the metrics; `auto` for d_ff up to 1024.
    """

    def __init__(
        self,
        store: RunStore | None,
        loggers: Sequence[Logger],
        spectra: bool | str,
    ) -> None:
        self.latest: list[dict[str, Any]] = []
        """The rows of the last measurement that was written."""
        self._store = store
        self._loggers = loggers
        self._spectra = spectra

    def write(self, solved: Iterable[Solved]) -> None:
        """Writes measurements as they come; without a store it goes through them alone, as every
        process must: what comes between them is exchanged with the others."""
        for measured in solved:
            if self._store is None:
                continue
            step = measured.labels["step"]
            self.latest = measured.rows
            self._store.append_metrics(self.latest)
            self._store.append_groups(measured.group_rows)
            for spectra in measured.spectra:
                if self._stores(spectra):
                    self._store.append_spectra(_spectra_rows(step, spectra))
            self._store.flush(step)
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
        if spectrum.isfinite().all()  # else nothing was measured, as the row's status says
    ]
