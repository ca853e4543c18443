"""The run of a series of checkpoints: measured one by one, gone on with, and added to later."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from nerve.errors import StoreError
from nerve.measuring.eigenproblem import FFNSpectra
from nerve.recording.run import RecordedRun, recorded_run
from nerve.recording.solver import Solved
from nerve.recording.writer import SpectraWriter
from nerve.storage.directory import RunDirectory
from nerve.storage.identity import differences

WEIGHTS = "weights"
"""The key of the configuration that lists what is measured: each step with a digest of its
weights. It grows with the series, and is written once all rows of a step are stored."""

_SHOWN = 5
_BEAT_EVERY_S = 10.0


class Series:
    """Takes the measurements of a series, each of a step, in any order.

    Attributes:
        digests: of the weights, by step, of what is measured by now.
    """

    def __init__(self, run: RecordedRun, digests: Mapping[int, str], spectra: bool | str) -> None:
        self.digests = dict(digests)
        self._record, self._writer = run.record, SpectraWriter(run.store, (), spectra)
        self._heard = time.monotonic()

    def add(self, labels: Mapping[str, Any], spectra: Sequence[FFNSpectra], digest: str) -> None:
        """Stores the measurement of a step; rows of the same step that a process left that was
        killed give way.

        Args:
            labels: `step`, `tokens_seen`, and what else the rows have in common.
            spectra: of each FFN.
            digest: of the weights that they are of.
        """
        step = labels["step"]
        self._writer.write([Solved(dict(labels), list(spectra))])
        self.digests[step] = digest
        changes: dict[str, Any] = {
            "step": max(self.digests),
            "config": {**self._record.config, WEIGHTS: _listed(self.digests)},
        }
        if step == max(self.digests):
            changes["final"] = {"val_loss": labels.get("val_loss")}
        self._record.update(**changes)

    def beat(self) -> None:
        """Tells from time to time that the run lives; to be called often."""
        if time.monotonic() - self._heard > _BEAT_EVERY_S:
            self._heard = time.monotonic()
            self._record.update()


class Measured(NamedTuple):
    """What there is of a series.

    Attributes:
        digests: of the weights, by step.
        began: when it was measured first; None where it was not.
        is_done: whether the last process that measured came to its end.
    """

    digests: dict[int, str]
    began: str | None = None
    is_done: bool = False


def measured_of(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> Measured:
    """What a directory has of a series of this configuration.

    Raises:
        StoreError: for a directory with another run.
    """
    record = RunDirectory(directory).record
    if record is None:
        return Measured({})
    different = [key for key in differences(record.config, config) if key != WEIGHTS]
    if different:
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise StoreError(
            f"A directory holds one run; {record.directory} holds run {record.run_id} "
            f"({record.run_status}) with other values of {', '.join(different[:_SHOWN])}{more}. "
            "Choose another directory, or delete that one."
        )
    digests = {int(step): digest for step, digest in record.config.get(WEIGHTS, [])}
    return Measured(digests, record.started, record.run_status == "done")


@contextmanager
def series_run(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    spectra: bool | str,
    **first: Any,
) -> Iterator[Series]:
    """The run of a series, new or gone on with, within the block.

    Args:
        directory: the run directory.
        config: what tells runs apart beside the weights.
        spectra: whether eigenvalues are stored, as in `SpectraWriter`.
        first: fields of a new run's record.

    Raises:
        StoreError: as `measured_of` and `recorded_run`.
    """
    digests = measured_of(directory, config).digests
    asked = {**config, WEIGHTS: _listed(digests)}
    with recorded_run(directory, asked, goes_on=True, **first) as run:
        assert run is not None  # of a single process
        yield Series(run, digests, spectra)


def _listed(digests: Mapping[int, str]) -> list[list[Any]]:
    return [[step, digests[step]] for step in sorted(digests)]
