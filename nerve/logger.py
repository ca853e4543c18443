"""Lightning loggers that go on where a resumed run does: the run's store, and a CSV file."""

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
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
        return "scalars"

    @property
    def version(self) -> str:
        return self._store.run_id

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

    A file that is there already is gone on with. A resumed run logs the steps past its checkpoint
    again; such a row takes the place of the one of the same step and names.

    Args:
        directory: where the file lies.
        every_n_rows: how many rows may wait in memory.
    """

    def __init__(self, directory: str | Path, every_n_rows: int = 100) -> None:
        super().__init__()
        self._path = Path(directory) / "metrics.csv"
        self._every_n_rows = every_n_rows
        self._rows: dict[tuple[str, ...], dict[str, str]] | None = None
        self._n_waiting = 0

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
        row = {"step": str(step or 0)}
        row |= {name: repr(float(value)) for name, value in metrics.items() if name != "step"}
        self._known()[_key(row)] = row
        self._n_waiting += 1
        if self._n_waiting >= self._every_n_rows:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Writes the file anew, atomically, if rows are waiting."""
        if not self._n_waiting:
            return
        rows = self._known().values()
        names = sorted({name for row in rows for name in row} - {"step"})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["step", *names])
        writer.writeheader()
        writer.writerows(rows)
        with refusals_named(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, lambda file: file.write(text.getvalue().encode()))
        self._n_waiting = 0

    def finalize(self, status: str) -> None:
        self.save()

    def _known(self) -> dict[tuple[str, ...], dict[str, str]]:
        """All rows, those of an earlier piece of the run included."""
        if self._rows is None:
            self._rows = {}
            if self._path.exists():
                with open(self._path, newline="", encoding="utf-8") as file:
                    for row in csv.DictReader(file):
                        present = {name: value for name, value in row.items() if value}
                        self._rows[_key(present)] = present
        return self._rows


def _key(row: Mapping[str, str]) -> tuple[str, ...]:
    return (row["step"], *sorted(row))
