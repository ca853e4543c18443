"""The runs of the study: each sweep is loaded once, with its designs and the values by layer.

A design is named by its `level`, the text of the configuration values that a question is about.
Flagged runs are only in `runs` and `points`, and in no mean or sample.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from nerve import Runs, depth_means, final_metrics, flag_runs, metrics_by_depth
from nerve.analysis.factors import level_text

NAMES = (
    *("se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js", "pr_gain"),
    *("variance_pre", "variance_post"),
)
FACTORS = (
    "level",
    "folder",
    "model.d_model",
    "ffn.width",
    "optimizer.lr",
    "optimizer.schedule.warmup",
    "final.val_accuracy",
)


@dataclass(frozen=True)
class Sweep:
    """Runs of one question.

    Attributes:
        runs: rows of `load_runs`; the column `level`, if there is one, names the design, and
            `folder` the sweep.
        metrics: rows of `load_metrics`; rows of other runs are ignored.
        whole: a sweep that has all these runs, whose flags are used where they are the same.
    """

    runs: pd.DataFrame
    metrics: pd.DataFrame
    whole: "Sweep | None" = None

    def where(self, kept: pd.Series) -> "Sweep":
        """The runs for which `kept` is true."""
        return Sweep(self.runs[kept], self.metrics, self)

    def by(self, *columns: str) -> "Sweep":
        """The same runs with the values of these columns as their `level`."""
        texts = [self.runs[name].map(level_text) for name in columns]
        level = texts[0].str.cat(texts[1:], sep=" ") if len(texts) > 1 else texts[0]
        return Sweep(self.runs.assign(level=level), self.metrics, self)

    @cached_property
    def flags(self) -> pd.DataFrame:
        """Which runs can be compared, and why others cannot.

        A run's flag depends on other runs only if it repeats one of them.
        """
        if self.whole is None or self.whole.has_repeats:
            return flag_runs(self.metrics, self.runs)
        flags = self.whole.flags
        return flags[flags["run_id"].isin(self.runs["run_id"])].reset_index(drop=True)

    @cached_property
    def has_repeats(self) -> bool:
        """Whether a run is flagged because of another one."""
        return bool((self.flags["flag"] == "repeat").any())

    @cached_property
    def points(self) -> pd.DataFrame:
        """Means over layers at the last step, including flagged runs."""
        if self.whole is None or self.whole.has_repeats:
            return final_metrics(self.metrics, self.runs, self._factors)
        points = self.whole.points
        points = points[points["run_id"].isin(self.runs["run_id"])].reset_index(drop=True)
        own = self.runs.set_index("run_id")[self._factors].loc[points["run_id"]]
        return points.assign(**own.reset_index(drop=True))

    @cached_property
    def ok(self) -> pd.DataFrame:
        """The rows of `points` that can be compared."""
        return self.points[self.points["flag"] == "ok"]

    @cached_property
    def means(self) -> pd.DataFrame:
        """Means over all layers and over the middle third at every step."""
        rows = depth_means(self.metrics, self.runs, self._factors, names=NAMES)
        return rows[rows["flag"] == "ok"]

    @cached_property
    def curves(self) -> pd.DataFrame:
        """The rows of `means` that are over all layers."""
        return self.means[self.means["region"] == "all"]

    @cached_property
    def all_layers(self) -> pd.DataFrame:
        """Every layer at every step."""
        rows = metrics_by_depth(self.metrics, self.runs, self._factors, names=NAMES)
        return rows[rows["flag"] == "ok"]

    @cached_property
    def layers(self) -> pd.DataFrame:
        """Every layer at the last step."""
        return last_step(self.all_layers)

    def final(self, name: str, level: str, ffn: str = "ffn") -> np.ndarray:
        """One value per seed of a design at the end: a metric's mean over layers, or the loss."""
        rows = self.ok[(self.ok["level"] == level) & (self.ok["ffn"] == ffn)]
        return rows.sort_values("seed")[name].to_numpy(float)

    def middle(self, name: str, level: str) -> np.ndarray:
        """Like `final`, with the mean over the middle third of the layers."""
        rows = last_step(self.means)
        rows = rows[(rows["level"] == level) & (rows["region"] == "middle")]
        return rows.sort_values("seed")[name].to_numpy(float)

    def by_layer(self, name: str, level: str) -> pd.DataFrame:
        """A metric of a design at the end, one row per seed and one column per layer."""
        rows = self.layers[self.layers["level"] == level]
        return rows.pivot(index="seed", columns="layer", values=name)

    def scale(self) -> str:
        """Size and length of the runs that can be compared: `12 × 512, 1,000 steps`."""
        runs = self.compared
        size = f"{span(runs['model.n_layers'])} × {span(runs['model.d_model'])}"
        return f"{size}, {span(runs['step'])} steps"

    def seeds(self) -> str:
        """The number of seeds of the designs: `3`, or `1 to 3`."""
        return span(self.compared.groupby("design_id")["seed"].nunique())

    @property
    def compared(self) -> pd.DataFrame:
        """The rows of `runs` that can be compared."""
        return self.runs[(self.flags["flag"] == "ok").to_numpy()]

    @property
    def _factors(self) -> list[str]:
        return [name for name in FACTORS if name in self.runs.columns]


class Evidence:
    """The sweeps below a folder, each loaded on first access.

    Args:
        root: contains a folder of runs for each sweep.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._loaded: dict[tuple[str, ...], Sweep] = {}

    @cached_property
    def names(self) -> list[str]:
        """The sweeps that have a run."""
        return sorted({path.parent.parent.name for path in self.root.glob("*/*/run.json")})

    def sweep(self, *names: str) -> Sweep:
        """The runs of these sweeps together."""
        if names not in self._loaded:
            loaded = Runs(self.root / name for name in names)
            folders = [record.directory.parent.name for record in loaded.records]
            self._loaded[names] = Sweep(loaded.frame.assign(folder=folders), loaded.metrics)
        return self._loaded[names]

    def has(self, names: Iterable[str]) -> bool:
        """Whether each of these sweeps has a run that can be compared."""
        return all(
            name in self.names and (self.sweep(name).flags["flag"] == "ok").any() for name in names
        )


def last_step(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each run's last step."""
    return rows[rows["step"] == rows.groupby("run_id", observed=True)["step"].transform("max")]


def span(values: pd.Series) -> str:
    """The lowest and the highest of integers, or one number if they are equal."""
    low, high = f"{values.min():,.0f}", f"{values.max():,.0f}"
    return low if low == high else f"{low} to {high}"
