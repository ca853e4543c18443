"""Lightning loggers that go on where a resumed run does: the run's store, a CSV file, wandb."""

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only

from nerve.results.atomic import refusals_named, write_atomically
from nerve.results.store import RunStore


class StoreLogger(Logger):
    """Appends what Lightning logs to the `scalars` table: one row a name and step.

    A training scalar labelled step s was computed with the weights after s optimizer steps, as in
    the `metrics` table.

    Args:
        store: where rows go; whoever owns it flushes it.
    """

    def __init__(self, store: RunStore) -> None:
        super().__init__()
        self._store = store

    @property
    def name(self) -> str:
        return ""  # ModelCheckpoint puts its files below name and version: into checkpoints/

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do: run.json holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._store.append_scalars(
            {"step": step or 0, "name": name, "value": float(value)}
            for name, value in metrics.items()
            if name != "epoch"
        )


class CSVLogger(Logger):
    """Keeps `metrics.csv`: a row for each call that logs, a column for each name.

    New rows are appended; where there is a new column, too, the file is written anew. A file that
    is there already is gone on with. A resumed run logs the steps past its checkpoint again; such a
    row takes the place of the one of the same step and names.

    Args:
        directory: where the file lies.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self._path = Path(directory) / "metrics.csv"
        self._rows: dict[tuple[str, ...], dict[str, str]] = {}
        self._columns: list[str] = []
        self._waiting: list[dict[str, str]] = []
        self._is_read = False
        self._is_stale = False

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do: run.json holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._read()
        row = {"step": str(step or 0)}
        row |= {name: repr(float(value)) for name, value in metrics.items() if name != "step"}
        key = _key(row)
        self._is_stale |= key in self._rows or not row.keys() <= set(self._columns)
        self._rows[key] = row
        self._waiting.append(row)

    @rank_zero_only
    def save(self) -> None:
        """Writes the rows that are waiting. Lightning calls it after each row.

        Raises:
            StoreError: when the file system refuses.
        """
        if not self._waiting:
            return
        with refusals_named(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._is_stale:
                self._columns = sorted({name for row in self._rows.values() for name in row})
                self._columns.remove("step")
                self._columns.insert(0, "step")
                text = self._text([dict(zip(self._columns, self._columns)), *self._rows.values()])
                write_atomically(self._path, lambda file: file.write(text))
            else:
                with open(self._path, "ab") as file:
                    file.write(self._text(self._waiting))
        self._waiting, self._is_stale = [], False

    def finalize(self, status: str) -> None:
        self.save()
