"""Lightning loggers that go on where a resumed run does: the run's store, a CSV file, wandb."""

import csv
import io
import logging
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only

from nerve.files import (
    as_store_error,
    remove_temporaries,
    require_there,
    write_atomically,
)
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore

log = logging.getLogger(__name__)

Row = dict[str, str]


class OwnLogger(Logger):
    """A logger without a name and a version, so that ModelCheckpoint puts its files into
    checkpoints/, and without hyperparameters: run.json holds the whole configuration."""

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        pass


class StoreLogger(OwnLogger):
    """Appends what Lightning logs to the `scalars` table: one row a name and step.

    A training scalar labeled step s was computed with the weights after s optimizer steps, as in
    the `metrics` table.

    Args:
        store: where rows go; whoever owns it flushes it.
    """

    def __init__(self, store: RunStore) -> None:
        super().__init__()
        self._store = store

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._store.append_scalars(
            {"step": step or 0, "name": name, "value": float(value)}
            for name, value in metrics.items()
            if name != "epoch"
        )


class CSVLogger(OwnLogger):
    """Keeps `metrics.csv`: a row for each call that logs, a column for each name.

    Rows are appended; where one brings a new column the file is written anew. A file that is there
    already is gone on with. A resumed run logs the steps past its checkpoint again; once it ends,
    such a row is in the place of the one of the same step and names.

    Args:
        directory: where the file lies.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self._path = Path(directory) / "metrics.csv"
        self._is_made = False
        self._columns: list[str] = []
        self._waiting: list[Row] = []

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": str(step or 0)}
        row |= {name: repr(float(value)) for name, value in metrics.items() if name != "step"}
        self._waiting.append(row)

    @rank_zero_only
    def save(self) -> None:
        """Writes the rows that wait. Lightning calls it whenever it has logged.

        Raises:
            StoreError: when the file system refuses.
        """
        if any(not row.keys() <= set(self._columns) for row in self._waiting):
            self._write_anew()
        elif self._waiting:
            columns, self._columns = self._columns, []  # a refusal may leave half a row behind
            with as_store_error(self._path), open(self._path, "ab") as file:
                file.write(_text(columns, self._waiting))
            self._columns, self._waiting = columns, []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._waiting or self._path.exists():  # of a piece that was killed before it came here
            self._write_anew()

    def _write_anew(self) -> None:
        """Writes all rows, each once, below the names of all columns."""
        rows = {_key(row): row for row in (*self._stored(), *self._waiting)}
        columns = ["step", *sorted({name for row in rows.values() for name in row} - {"step"})]
        header = dict(zip(columns, columns, strict=True))
        text = _text(columns, [header, *rows.values()])
        if not self._is_made:  # later on it is gone with the run's directory
            with as_store_error(self._path.parent):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            self._is_made = True
        require_there(self._path.parent)
        remove_temporaries(self._path.parent)
        write_atomically(self._path, lambda file: file.write(text))
        self._columns, self._waiting = columns, []

    def _stored(self) -> list[Row]:
        if not self._path.exists():
            return []
        whole, _, _ = self._path.read_text(encoding="utf-8").rpartition("\n")  # but half a row
        reader = csv.DictReader(io.StringIO(whole))
        return [{name: value for name, value in row.items() if value} for row in reader]


class WandbLogger(LightningWandbLogger):
    """Lightning's, for the run of a run directory.

    At wandb the run has the id of its record, with which a resumed run goes on there, and the group
    of its sweep; a run that begins under wandb's agent, or with WANDB_RUN_ID, WANDB_NAME or
    WANDB_RUN_GROUP, has those. It ends there when it ends here: a next one in this process gets its
    own.

    Args:
        directory: of the run, which has its record already; wandb keeps its files in wandb/ there.
        arguments: others of Lightning's logger, such as `project`.

    Attributes:
        wandb_id: of the run at wandb, for its record; None in a process that writes nothing.

    Raises:
        StoreError: when there is no record.
    """

    def __init__(self, directory: str | Path, **arguments: Any) -> None:
        self.wandb_id: str | None = None
        if vars(rank_zero_only)["rank"] == 0:  # the others write nothing
            record = RunRecord.load(directory)
            own = {"id": wandb_id_of(record)}
            if "WANDB_NAME" not in os.environ:
                own["name"] = record.run_id
            if record.sweep is not None and "WANDB_RUN_GROUP" not in os.environ:
                own["group"] = record.sweep
            arguments = own | arguments
            self.wandb_id = str(arguments["id"])
        super().__init__(save_dir=directory, **arguments)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def wandb_id_of(record: RunRecord) -> str:
    """The id of a run at wandb: that of its record, or the one that its environment gives it when
    it begins. Trials of a sweep share an environment, and one id would make them one run."""
    if record.wandb_id is not None:
        return record.wandb_id
    given = os.environ.get("WANDB_RUN_ID")
    if not given or record.restarts:
        return record.run_id
    if record.sweep is not None:
        log.warning("WANDB_RUN_ID=%s names one run, and is left out in a sweep", given)
        return record.run_id
    return given


def wandb_id_in(loggers: Iterable[Logger]) -> str | None:
    """The id that a run has at wandb; None for one that is not there."""
    ids = (logger.wandb_id for logger in loggers if isinstance(logger, WandbLogger))
    return next(ids, None)


def _text(columns: Sequence[str], rows: Iterable[Row]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()


def _key(row: Row) -> tuple[str, ...]:
    return (row["step"], *sorted(row))
