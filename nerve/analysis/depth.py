"""Metrics over depth: by layer, and means over all layers and over the middle third."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd

from nerve.analysis.flags import describe_runs, flag_runs
from nerve.analysis.frames import (
    AT_STEP,
    average_layers,
    join_runs,
    require_columns,
    require_names,
    rows_of,
)
from nerve.metric_names import columns_of

DEPTH_NAMES = columns_of(lambda metric: "depth" in metric.shown)
"""The metrics that are shown over depth."""

STACKS = ("encoder_", "decoder_")
"""Prefixes of FFNs whose layers are numbered within a part of the model, whose number of layers is
not recorded: that of the model is the encoder's."""

Region = Literal["all", "middle"]
REGIONS: tuple[Region, ...] = ("all", "middle")


def metrics_by_depth(
    metrics: pd.DataFrame,
    runs: pd.DataFrame,
    factors: Sequence[str] = (),
    *,
    names: Sequence[str] = DEPTH_NAMES,
) -> pd.DataFrame:
    """One row per run, FFN name, step and layer: the data of a heat map over depth and time.

    Columns:

    - `run_id, config_id, design_id, sweep, seed`, the `factors`, `data, heldout, flag` (see
      `flag_runs`)
    - `ffn, step, layer`
    - `depth`: of the layer's center, (layer + ½)/L, in (0, 1); L is `model.n_layers`, or, if `runs`
      does not have it and for an encoder and a decoder, 1 + the last layer in `metrics`
    - `middle`: whether the layer is in the middle third, depth in [⅓, ⅔]; with two layers, both are
    - `tokens_seen, train_loss, val_loss, status`, the metrics `names`

    Args:
        metrics: rows of `load_metrics`.
        runs: rows of `load_runs`; rows of other runs are ignored.
        factors: columns of `runs` to keep.
        names: the metrics, columns of `metrics`.

    Raises:
        ConfigError: for a name or factor that is not a column, or a factor that the frame already
            has.
    """
    described = _described(metrics, runs, factors, names)
    metrics, _ = rows_of(metrics, runs)
    rows = join_runs(metrics[["run_id", "ffn", "step", "layer"]], described)
    n_layers = _n_layers(rows, runs)
    rows["depth"] = (rows["layer"].astype(int) + 0.5) / n_layers
    rows["middle"] = _is_middle(rows, n_layers)
    values = metrics[[*AT_STEP, "status", *names]].reset_index(drop=True)
    return pd.concat([rows, values], axis=1)


def depth_means(
    metrics: pd.DataFrame,
    runs: pd.DataFrame,
    factors: Sequence[str] = (),
    *,
    names: Sequence[str] = DEPTH_NAMES,
    regions: Sequence[Region] = REGIONS,
) -> pd.DataFrame:
    """One row per run, FFN name, step and region: means over all layers and over the middle third.

    Columns: those of `metrics_by_depth` without `layer, depth, middle, status`, and

    - `region`: `all` or `middle`
    - `n_layers`: layers with a row; `n_null`: those where nothing could be measured, which the
      means exclude

    Arguments and errors as in `metrics_by_depth`; `regions` are the regions to average over.
    """
    described = _described(metrics, runs, factors, names)
    metrics, _ = rows_of(metrics, runs)
    tables = []
    for region in regions:
        rows = (
            metrics if region == "all" else metrics[_is_middle(metrics, _n_layers(metrics, runs))]
        )
        means = average_layers(rows, names)
        means.insert(3, "region", region)
        tables.append(means)
    return join_runs(pd.concat(tables), described)


def _is_middle(rows: pd.DataFrame, n_layers: pd.Series) -> pd.Series:
    """|depth - ½| ≤ ⅙, computed in integers; with two layers, both are in the middle."""
    return 3 * (2 * rows["layer"].astype(int) + 1 - n_layers).abs() <= np.maximum(n_layers, 3)


def _n_layers(rows: pd.DataFrame, runs: pd.DataFrame) -> pd.Series:
    ffns = [rows["run_id"], rows["ffn"]]
    measured = 1 + rows["layer"].astype(int).groupby(ffns, observed=True).transform("max")
    if "model.n_layers" not in runs:
        return measured
    known = pd.to_numeric(runs.set_index("run_id")["model.n_layers"], errors="coerce")
    known = rows["run_id"].map(known).astype(float)
    of_stacks = [name for name in rows["ffn"].unique() if str(name).startswith(STACKS)]
    known = known.where(~rows["ffn"].isin(of_stacks))
    return known.fillna(measured).clip(lower=measured).astype(int)


def _described(
    metrics: pd.DataFrame, runs: pd.DataFrame, factors: Sequence[str], names: Sequence[str]
) -> pd.DataFrame:
    require_names(factors=factors, names=names)
    keys = ["ffn", "step", "layer", *AT_STEP, "status", *names]
    require_columns(metrics, keys, "load_metrics")
    taken = [*keys, "depth", "middle", "region", "n_layers", "n_null"]
    return describe_runs(flag_runs(metrics, runs), runs, factors, taken)
