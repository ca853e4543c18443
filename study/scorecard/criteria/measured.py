"""The runs that a core check compares, as arrays, which null models transform."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from evidence import Sweep

NAMES = ("se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js")
Design = Mapping[str, object]
"""Configuration values by their dotted names; a tuple stands for any of its values."""


@dataclass(frozen=True)
class Measured:
    """Runs of one comparison, one corpus, measured at the same steps.

    Attributes:
        design: name of each run's design, shape (run,).
        seed: shape (run,); runs of one seed share the order of their data.
        width: d_ff / d_model, shape (run,).
        steps: the steps at which all of them were measured, rising, shape (step,).
        spectra: each of NAMES, shape (run, step, layer); a Mixer's layers are those of
            token mixing, then those of channel mixing.
        loss: validation loss in nats, shape (run, step).
        accuracy: at the end, shape (run,); nan for text.
        runs: their rows of `load_runs`, in the same order.
        tokens: trained on, shape (run,).
    """

    design: np.ndarray
    seed: np.ndarray
    width: np.ndarray
    steps: np.ndarray
    spectra: Mapping[str, np.ndarray]
    loss: np.ndarray
    accuracy: np.ndarray
    runs: pd.DataFrame
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.design)

    def with_spectra(self, spectra: Mapping[str, np.ndarray]) -> "Measured":
        """The same runs as if these had been measured."""
        return replace(self, spectra=spectra)

    def of(self, names: Sequence[str]) -> np.ndarray:
        """Whether each run is of one of these designs, shape (run,)."""
        return np.isin(self.design, list(names))

    @property
    def n_layers(self) -> int:
        return self.spectra["js"].shape[-1]


def measure(sweep: Sweep, designs: Mapping[str, Design]) -> Measured | None:
    """The runs of these designs that can be compared, or None where there is none.

    Runs of different corpora are never pooled: those of the corpus with most runs are taken.
    Of the steps those are taken at which every run was measured.
    """
    flags = sweep.flags.set_index("run_id")
    runs = sweep.runs[sweep.runs["run_id"].map(flags["flag"]) == "ok"]
    name = pd.Series("", index=runs.index)
    for design, values in designs.items():
        name[_has(runs, values)] = design
    runs = runs.assign(_design=name)[name != ""]
    if runs.empty:
        return None
    data = runs["run_id"].map(flags["data"])
    runs = runs[data == data.value_counts().index[0]].sort_values(["_design", "seed"])
    rows = sweep.metrics[sweep.metrics["run_id"].isin(runs["run_id"])]
    common = set.intersection(
        *(set(own) for _, own in rows.groupby("run_id", observed=True)["step"])
    )
    steps = np.array(sorted(common))
    order = pd.Index(runs["run_id"])
    rows = rows[rows["step"].isin(steps)]
    # Token mixing comes before channel mixing, as in a block.
    units = (rows["ffn"] == "channel_mixing").to_numpy() * 1000 + rows["layer"].to_numpy(int)
    present, unit = np.unique(units, return_inverse=True)
    run, step = order.get_indexer(rows["run_id"]), np.searchsorted(steps, rows["step"])
    spectra = np.full((len(NAMES), len(runs), len(steps), len(present)), np.nan)
    spectra[:, run, step, unit] = rows[list(NAMES)].to_numpy(float).T
    losses = np.full((len(runs), len(steps)), np.nan)
    losses[run, step] = rows["val_loss"]
    nothing = np.full(len(runs), np.nan)
    accuracy = runs.get("final.val_accuracy", pd.Series(nothing)).to_numpy(float)
    return Measured(
        design=runs["_design"].to_numpy(str),
        seed=runs["seed"].to_numpy(int),
        width=runs["ffn.width"].map(_number).to_numpy(float),
        steps=steps,
        spectra=dict(zip(NAMES, spectra, strict=True)),
        loss=losses,
        accuracy=accuracy,
        runs=runs.reset_index(drop=True),
        tokens=rows.groupby("run_id", observed=True)["tokens_seen"]
        .max()
        .loc[order]
        .to_numpy(float),
    )


def _has(runs: pd.DataFrame, values: Design) -> pd.Series:
    kept = pd.Series(True, index=runs.index)
    for name, value in values.items():
        allowed = value if isinstance(value, tuple) else (value,)
        kept &= runs[name].isin(allowed) if name in runs else False
    return kept


def _number(width: object) -> float:
    """A width such as 4 or "8/3"; nan for none."""
    if isinstance(width, str) and "/" in width:
        above, below = width.split("/")
        return float(above) / float(below)
    return float(width) if width is not None else float("nan")
