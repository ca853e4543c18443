"""What becomes of measurements: they are solved beside training, stored, and given to loggers."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from nerve.measuring.eigenproblem import FFNProblem, FFNSpectra
from nerve.metric_names import logged_values
from nerve.recording.solver import Labels, Solved, Solver
from nerve.storage.store import RunStore

LARGEST_D_FF_FOR_SPECTRA = 1024
"""Up to this width `spectra="auto"` stores the eigenvalues themselves (4 KiB a layer and site)."""


class Logger(Protocol):
    """What is given each measurement beside the store, such as a logger of Lightning."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Takes named numbers of a step."""

    def save(self) -> None:
        """Writes what it was given."""


class Recorder:
    """Takes the problems of measurements and writes their rows, in the order of measurements.

    Of several processes, each takes its share of the problems, and that with the store writes. All
    must call `submit` and `drain` alike: there they exchange what they have solved.

    Args:
        solver: solves the problems.
        store: where rows go; flushed after each measurement. None in a process that does not write.
        loggers: get each measurement with its own step.
        spectra: whether eigenvalues are stored beside the metrics; `auto` for d_ff up to 1024.
    """

    def __init__(
        self,
        solver: Solver,
        store: RunStore | None,
        loggers: Sequence[Logger],
        spectra: bool | Literal["auto"],
    ) -> None:
        self.latest: list[dict[str, Any]] = []
        """The rows of the last measurement that is solved; of several processes, where they are
        written."""
        self._solver = solver
        self._store = store
        self._loggers = loggers
        self._spectra = spectra

    def submit(self, labels: Labels, problems: Sequence[FFNProblem]) -> None:
        """Takes a measurement with the columns that its rows share, such as `step`, and records
        what is solved by then. Raises as `Solver.submit`, as do the others."""
        self._record(self._solver.submit(labels, problems))

    def collect(self) -> None:
        """Records what is solved by now."""
        self._record(self._solver.finished())

    def drain(self) -> None:
        """Waits for all measurements and records them."""
        self._record(self._solver.drain())

    def close(self) -> None:
        """Ends the solver; what is still pending is dropped."""
        self._solver.close()

    def _record(self, solved: Iterable[Solved]) -> None:
        for measured in solved:  # in every process: it is where they exchange their spectra
            if self._store is None:
                continue
            step = measured.labels["step"]
            self.latest = [measured.labels | spectra.row() for spectra in measured.spectra]
            self._store.append_metrics(self.latest)
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
        return self._spectra


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
