"""Where a run passes a loss on its way down, between two measured steps."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from nerve.analysis.statistics import Array


@dataclass(frozen=True)
class Crossing:
    """A place between two measured steps.

    Attributes:
        before, after: positions of the two; the same where the place is a measured step.
        share: how much of the way from the loss of the one to that of the other lies behind, in
            [0, 1].
    """

    before: int
    after: int
    share: float

    def interpolate(self, series: Array) -> Array:
        """The value of a series there, linear in the loss; shape (step, …) gives (…)."""
        first, last = series[self.before], series[self.after]
        return first + self.share * (last - first)


def last_crossing(loss: Array, level: float) -> Crossing | None:
    """Where a loss passes a level for the last time and stays at or below it from there on.

    A loss that ends at the level is there at its last step. None for one that ends above, and for
    one that was never measured above: it passed the level before its first measured step.

    Args:
        loss: in the order of steps, shape (step,).
    """
    last = len(loss) - 1
    if last >= 0 and loss[last] == level:
        return Crossing(last, last, 0.0)
    above = np.flatnonzero(loss > level)
    if not len(above) or above[-1] == last:
        return None
    i = int(above[-1])
    return Crossing(i, i + 1, float((loss[i] - level) / (loss[i] - loss[i + 1])))


def rows_at_crossings(means: pd.DataFrame, levels: pd.Series, names: list[str]) -> pd.DataFrame:
    """Rows of `average_layers` where each run and FFN passes the level of its run.

    Args:
        means: `run_id, ffn, step, val_loss, n_layers, n_null` and `names`; the counts are the
            larger of those of the two steps, all else is interpolated.
        levels: the loss to look for, by `run_id`; a run without one has no row.
    """
    found = []
    finite = means[np.isfinite(means["val_loss"])].sort_values("step")
    for (run_id, ffn), rows in finite.groupby(["run_id", "ffn"], sort=False, observed=True):
        place = last_crossing(rows["val_loss"].to_numpy(float), float(levels.get(run_id, np.nan)))
        if place is None:
            continue
        values = rows[names].to_numpy(float, na_value=np.nan)
        counts = rows[["n_layers", "n_null"]].to_numpy(int)
        more = np.maximum(counts[place.before], counts[place.after])
        found.append((run_id, ffn, *place.interpolate(values), *more))
    columns = ["run_id", "ffn", *names, "n_layers", "n_null"]
    return pd.DataFrame(found, columns=columns)
