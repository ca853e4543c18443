"""The FFNs that were found in a model, as a list that prints as a table."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from torch import nn

from nerve.measuring.ffns import FFN, n_inputs, pool_of, sites_of
from nerve.measuring.processes import rank
from nerve.measuring.slices import products_of

log = logging.getLogger(__name__)


class FoundFFNs(list[FFN]):
    """The FFNs of a model; prints as a table.

    Attributes:
        unclear: for each candidate that may be an FFN, a line of code that describes it, with the
            reason why it is not included.
    """

    def __init__(self, ffns: Iterable[FFN], paths: Mapping[nn.Module, str], unclear: Sequence[str]):
        super().__init__(ffns)
        self._paths = paths
        self.unclear = list(unclear)

    @property
    def notes(self) -> list[str]:
        """How the model runs differently while these FFNs are measured."""
        replaced = {
            (type(each.holder).__name__, each.replaces)
            for each in products_of(sites_of(ffn) for ffn in self)
            if each.replaces is not None
        }
        return [
            f"{name}: runs with its plain implementation instead of {what} during measurement."
            for name, what in sorted(replaced)
        ]

    def warn(self) -> None:
        """Logs a warning for each candidate that is not included; of several processes, only rank 0
        does. For callers that measure what is found, without showing the table."""
        for line in self.unclear if rank() == 0 else ():
            log.warning("not measured; if it is an FFN, describe it by hand: %s", line)

    def table(self) -> pd.DataFrame:
        """One row per FFN: layer, name, pre, post, d_in, d_ff, gated, n_runs, pool."""
        return pd.DataFrame([self._row(ffn) for ffn in self]).astype({"n_runs": "Int64"})

    def __repr__(self) -> str:
        table = self.table()
        if (table["n_runs"] == 1).all():
            table = table.drop(columns="n_runs")
        lines = [table.dropna(axis="columns", how="all").to_string(index=False), *self.notes]
        if self.unclear:
            lines += ["Not measured; if it is an FFN, describe it by hand:", *self.unclear]
        return "\n".join(lines)

    def _row(self, ffn: FFN) -> dict[str, Any]:
        pre, post = sites_of(ffn)
        return {
            "layer": ffn.layer,
            "name": ffn.name,
            "pre": self._paths.get(pre.module, "?") + _part(pre.part),
            "post": self._paths.get(post.module, "?"),
            "d_in": n_inputs(pre),
            "d_ff": post.width,
            "gated": getattr(ffn, "gated", None),
            "n_runs": getattr(ffn, "n_runs", 1),
            "pool": pool_of(ffn),
        }


def _part(part: slice) -> str:
    if part == slice(None):
        return ""
    step = "" if part.step is None else f":{part.step}"
    return f"[{part.start or 0}:{'' if part.stop is None else part.stop}{step}]"
