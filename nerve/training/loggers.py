"""Lightning loggers that continue when a run is resumed: the run's store, a CSV file, wandb."""

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
    """A logger without a name and a version, so that ModelCheckpoint writes its files to
    checkpoints/, and without hyperparameters, because run.json holds the whole configuration."""

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
    """Appends what Lightning logs to the `scalars` table: one row per name and step.

    A training scalar labeled step s was computed with the weights after s optimizer steps, as in
    the `metrics` table.

    Args:
        store: receives the rows; its owner flushes it.
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
    """Writes `metrics.csv`: one row per logging call, one column per name.

    Rows are appended; if a row has a new column, the file is rewritten. An existing file is
    continued. A resumed run logs the steps after its checkpoint again; when it ends, such a row
    replaces the earlier one of the same step and names.

    Args:
        directory: the folder of the file.
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
        """Writes the pending rows. Lightning calls this after each logging call.

        Raises:
            StoreError: when the file cannot be written.
        """
        if any(not row.keys() <= set(self._columns) for row in self._waiting):
            self._write_anew()
        elif self._waiting:
            columns, self._columns = self._columns, []  # a failed write may leave half a row
            with as_store_error(self._path), open(self._path, "ab") as file:
                file.write(_text(columns, self._waiting))
            self._columns, self._waiting = columns, []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._waiting or self._path.exists():  # it may be from a killed process
            self._write_anew()

    def _write_anew(self) -> None:
        """Rewrites the file: the names of all columns, then each row once."""
        rows = {_key(row): row for row in (*self._stored(), *self._waiting)}
        columns = ["step", *sorted({name for row in rows.values() for name in row} - {"step"})]
        header = dict(zip(columns, columns, strict=True))
        text = _text(columns, [header, *rows.values()])
        if not self._is_made:  # if it is missing later, the run's directory was deleted
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
        whole, _, _ = self._path.read_text(encoding="utf-8").rpartition("\n")  # drops half a row
        reader = csv.DictReader(io.StringIO(whole))
        return [{name: value for name, value in row.items() if value} for row in reader]


class WandbLogger(LightningWandbLogger):
    """Lightning's wandb logger for the run of a run directory.

    In wandb, the run has the id of its record, which lets a resumed run continue there, and belongs
    to the group of its sweep. WANDB_RUN_ID, WANDB_NAME, WANDB_RUN_GROUP and wandb's agent take
    precedence when a run begins. The wandb run ends with this run, so that the next run in the same
    process gets its own.

    Args:
        directory: the run directory, which must contain a record; wandb writes to wandb/ in it.
        arguments: further arguments of Lightning's logger, such as `project`.

    Attributes:
        wandb_id: the id of the wandb run, for the record; None in a process that writes nothing.

    Raises:
        StoreError: if there is no record.
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
    """The id of a run in wandb: the one in its record, else WANDB_RUN_ID when the run first begins,
    else its run id. The trials of a sweep share an environment, so that WANDB_RUN_ID would merge
    them into one run."""
    if record.wandb_id is not None:
        return record.wandb_id
    given = os.environ.get("WANDB_RUN_ID")
    if not given or record.restarts:
        return record.run_id
    if record.sweep is not None:
        log.warning("WANDB_RUN_ID=%s names a single run and is ignored in a sweep", given)
        return record.run_id
    return given


def wandb_id_in(loggers: Iterable[Logger]) -> str | None:
    """The id of the run in wandb; None if it is not logged there."""
    ids = (logger.wandb_id for logger in loggers if isinstance(logger, WandbLogger))
    return next(ids, None)


def _text(columns: Sequence[str], rows: Iterable[Row]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()


def _key(row: Row) -> tuple[str, ...]:
    return (row["step"], *sorted(row))
