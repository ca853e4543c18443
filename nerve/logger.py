"""A Lightning logger that keeps every logged scalar in the run's store."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

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
