"""Determines which runs can be compared, and why the others cannot."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from nerve.analysis.frames import require_columns, require_factors
from nerve.config import require
from nerve.storage.find import listed

IDENTITY = ("run_id", "config_id", "design_id", "sweep", "seed")
FINGERPRINTS = ("fingerprints.corpus", "fingerprints.tokenizer")

FLAGS = (
    "ok",
    "diverged",
    "failed",
    "interrupted",
    "running",
    "no metrics",
    "no loss",
    "incomplete",
    "untrained",
    "repeat",
)
"""The flags of `flag_runs`; by default, only `ok` runs enter statistics over runs."""


def flag_runs(metrics: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """One row per run of `runs`, in the same order: how it ended and whether it can be compared.

    Columns:

    - `run_id, config_id, design_id, sweep, seed, run_status` as in `load_runs`
    - `flag`: the first of these that applies, else `ok`

      - `diverged`: it stopped with a DivergedError, or its validation loss ends NaN or infinite, or
        at or above the limit after having been below it
      - `failed`, `interrupted`, `running`: its `run_status`
      - `no metrics`: it has no row in `metrics`
      - `no loss`: no row has a validation loss
      - `incomplete`: parts of its metrics are damaged and were left out
      - `untrained`: its validation loss was never below the limit, if there is one
      - `repeat`: an earlier run with flag `ok` has the same configuration, seed and data, so that
        it is not an independent sample; runs without a recorded seed count as having the same seed

      The limit is `unigram_loss`, or, if none is stored, the first of several measured losses.
      Stores have no NaN: a loss that is missing at the last step counts as NaN, unless the features
      are finite there and either an earlier step lacks the loss, too (the run was evaluated less
      often than measured), or the training loss is known.

    - `reason`: one sentence with the numbers, empty for `ok`
    - `n_steps`: measured steps
    - `n_null`: rows whose `status` is not "ok" (dead layers); these do not affect the flag
    - `n_damaged_parts`: as in `load_metrics`
    - `first_loss, min_loss, final_loss`: validation loss, nats; the final one is missing if it was
      NaN; `final_step`, the last measured step; `unigram_loss` as in `load_runs`
    - `data`: identifies corpus and tokenizer by their fingerprints, missing without them; losses of
      runs with different values are never pooled
    - `heldout`: identifies the held-out set, which may differ within `data` (in `monitor.n_tokens`)

    Args:
        metrics: rows of `load_metrics`; rows of runs that are not in `runs` are ignored.
        runs: rows of `load_runs`.

    Raises:
        ConfigError: for frames without the columns of `load_metrics` and `load_runs`, or a run with
            two rows in `runs`.
    """
    require_columns(runs, [*IDENTITY, "run_status", "error", "unigram_loss"], "load_runs")
    doubled = [str(name) for name in runs["run_id"][runs["run_id"].duplicated()].unique()]
    require(
        not doubled,
        f"The frame of runs must have one row per run; got more of {listed(doubled)}. Load all "
        "paths with a single call, which counts each run once.",
    )
    frame = runs[[*IDENTITY, "run_status"]].reset_index(drop=True)
    frame = frame.merge(_steps(metrics), on="run_id", how="left")
    whole = dict.fromkeys(["n_steps", "n_null", "n_damaged_parts", "final_step"], "Int64")
    frame = frame.astype(whole).fillna({"n_steps": 0, "n_null": 0})
    frame["unigram_loss"] = runs["unigram_loss"].astype(float).to_numpy()
    errors = [error if isinstance(error, str) else "" for error in runs["error"]]
    stopped = np.array([error.startswith("DivergedError") for error in errors], dtype=bool)
    place = len(IDENTITY) + 1
    frame.insert(place, "flag", _flags(frame, stopped))
    frame = frame.drop(columns="n_losses")
    reasons = [_reason(run, error) for run, error in zip(frame.itertuples(), errors, strict=True)]
    frame.insert(place + 1, "reason", reasons)
    frame = frame.assign(data=_data(runs), heldout=_texts(runs, "fingerprints.heldout"))
    return _repeats_flagged(frame)


def describe_runs(
    flags: pd.DataFrame, runs: pd.DataFrame, factors: Sequence[str], taken: Sequence[str]
) -> pd.DataFrame:
    """The columns that describe each run in a table: `IDENTITY`, the `factors`, `data, heldout,
    flag`. `flags` are those of `runs`.

    Raises:
        ConfigError: for a factor that `runs` does not have, or that is one of `taken`.
    """
    require_factors(factors, runs, taken)
    known = [*IDENTITY, "data", "heldout", "flag"]
    more = [name for name in dict.fromkeys(factors) if name not in known]
    own = runs[more].reset_index(drop=True)  # its names may be those of other columns of flags
    parts = [flags[[*IDENTITY]], own, flags[["data", "heldout", "flag"]]]
    return pd.concat(parts, axis=1)


def _steps(metrics: pd.DataFrame) -> pd.DataFrame:
    """One row per run with metrics: its numbers of steps, losses and null rows, and its losses."""
    needed = ["run_id", "step", "train_loss", "val_loss", "status", "n_damaged_parts"]
    require_columns(metrics, needed, "load_metrics")
    rows = metrics[["run_id", "n_damaged_parts"]].assign(n_null=metrics["status"] != "ok")
    by_run = rows.groupby("run_id", observed=True)
    steps = metrics[["run_id", "step", "val_loss"]]
    # The layers of a step are consecutive rows with the same loss; one of them is enough.
    steps = steps[(steps != steps.shift()).any(axis=1)]
    steps = steps.groupby(["run_id", "step"], observed=True)["val_loss"].first().reset_index()
    by_step = steps.groupby("run_id", observed=True)
    last = steps.drop_duplicates("run_id", keep="last").set_index("run_id")
    return pd.DataFrame(
        {
            "n_steps": by_step.size(),
            "n_losses": by_step["val_loss"].count(),
            "n_null": by_run["n_null"].sum(),
            "n_damaged_parts": by_run["n_damaged_parts"].first(),
            "first_loss": by_step["val_loss"].first(),
            "min_loss": by_step["val_loss"].min(),
            "final_loss": last["val_loss"].fillna(_before_unevaluated(metrics, steps, last)),
            "final_step": last["step"],
        }
    ).reset_index()


def _before_unevaluated(
    metrics: pd.DataFrame, steps: pd.DataFrame, last: pd.DataFrame
) -> pd.Series:
    """The last validation loss, by `run_id`, of runs whose last step was measured but not
    evaluated.

    Args:
        metrics: rows of `load_metrics`.
        steps: `run_id, step, val_loss` in order, one row per measured step.
        last: the last of them by `run_id`.
    """
    lacking = last.index[last["val_loss"].isna()]
    if lacking.empty:
        return last["val_loss"]
    own = steps[steps["run_id"].isin(lacking)]
    known = own.dropna(subset="val_loss").drop_duplicates("run_id", keep="last")
    known = known.set_index("run_id")
    first_without = own[own["val_loss"].isna()].groupby("run_id", observed=True)["step"].min()
    is_sparse = first_without.reindex(known.index) < known["step"]
    ends = metrics.loc[
        metrics["run_id"].isin(known.index), ["run_id", "step", "train_loss", "status"]
    ]
    ends = ends[ends["step"].to_numpy() == last["step"].reindex(ends["run_id"]).to_numpy()]
    by_run = ends.assign(is_finite=~ends["status"].astype(str).str.startswith("non_finite"))
    by_run = by_run.groupby("run_id", observed=True)
    is_finite = by_run["is_finite"].all().reindex(known.index)
    trains = by_run["train_loss"].first().notna().reindex(known.index)
    return known["val_loss"].where(is_finite & (is_sparse | trains))


def _flags(frame: pd.DataFrame, stopped: np.ndarray) -> np.ndarray:
    limit = frame["unigram_loss"].fillna(frame["first_loss"])
    has_loss = frame["min_loss"].notna()
    has_limit = frame["unigram_loss"].notna() | (frame["n_losses"] > 1)
    was_below = frame["min_loss"] < limit
    is_below = frame["final_loss"] < limit
    not_finite = ~np.isfinite(frame["final_loss"])
    conditions: dict[str, Any] = {
        "diverged": stopped | (has_loss & (not_finite | (was_below & ~is_below))),
        **{name: frame["run_status"] == name for name in ("failed", "interrupted", "running")},
        "no metrics": frame["n_steps"] == 0,
        "no loss": ~has_loss,
        "incomplete": (frame["n_damaged_parts"] > 0).fillna(False),
        "untrained": has_limit & ~was_below,
    }
    conditions = {name: np.asarray(value, dtype=bool) for name, value in conditions.items()}
    return np.select([*conditions.values()], [*conditions], "ok").astype(object)


def _repeats_flagged(frame: pd.DataFrame) -> pd.DataFrame:
    sample = ["config_id", "seed", "data", "heldout"]
    fine = frame[(frame["flag"] == "ok") & frame["config_id"].notna()]
    first = fine.groupby(sample, dropna=False)["run_id"].transform("first")
    again = first.index[first != fine["run_id"]]
    frame.loc[again, "flag"] = "repeat"
    seeds = np.where(frame.loc[again, "seed"].isna(), "no recorded seed", "seed")
    frame.loc[again, "reason"] = [
        f"It repeats run {run_id}: the same configuration and {seed} on the same data."
        for run_id, seed in zip(first[again], seeds, strict=True)
    ]
    return frame


def _reason(run: Any, error: str) -> str:
    last = f"last measured at step {run.final_step}" if run.n_steps else "never measured"
    limit = (
        f"the loss {run.first_loss:.4g} of its first measured step"
        if math.isnan(run.unigram_loss)
        else f"its unigram loss {run.unigram_loss:.4g}"
    )
    return {
        "ok": "",
        "diverged": error
        or f"The validation loss ends at {run.final_loss:.4g}; its lowest was {run.min_loss:.4g}, "
        f"and {limit} the limit.",
        "failed": f"{error or 'It failed'} ({last})",
        "interrupted": f"It was interrupted ({last}).",
        "running": f"It is still running, or was killed ({last}).",
        "no metrics": "It has no rows of metrics.",
        "no loss": "None of its rows has a validation loss.",
        "incomplete": f"Parts of its metrics cannot be read: {run.n_damaged_parts}.",
        "untrained": f"Its lowest validation loss, {run.min_loss:.4g}, is not below {limit}.",
    }[run.flag]


def _data(runs: pd.DataFrame) -> pd.Series:
    """Eight hex digits that identify the text or images of a run; None if they are unknown."""
    named = zip(*(_texts(runs, name) for name in FINGERPRINTS), strict=True)
    names = [
        hashlib.sha256(f"{corpus} {tokenizer}".encode()).hexdigest()[:8]
        if corpus or tokenizer
        else None
        for corpus, tokenizer in named
    ]
    return pd.Series(names, dtype=object)


def _texts(runs: pd.DataFrame, name: str) -> pd.Series:
    """A column of strings; None if a run has none, or if the column does not exist."""
    values = runs[name] if name in runs.columns else [None] * len(runs)
    texts = [value if isinstance(value, str) else None for value in values]
    return pd.Series(texts, dtype=object)
