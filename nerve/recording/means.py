"""A measurement as named numbers: what loggers, callbacks and sweepers get of its rows."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from nerve.metric_names import MEASURED

Rows = Iterable[Mapping[str, Any]]


def mean_name(ffn: str, metric: str) -> str:
    """`ffn/mean/pr_post`: the mean of a metric over the layers of an FFN."""
    return f"{ffn}/mean/{metric}"


def mean_values(rows: Rows) -> dict[str, float]:
    """Each metric averaged: `pr_post` over all FFNs, `ffn/mean/pr_post` over the layers of `ffn`
    (a Mixer has `token_mixing/mean/pr_post` and `channel_mixing/mean/pr_post`).

    FFNs where nothing could be measured do not count; NaN where none is left.

    Args:
        rows: of one measurement, as in the `metrics` table; rows of earlier versions lack columns.
    """
    found: dict[str, list[float]] = {}
    for row in rows:
        for metric in MEASURED:
            for name in (metric, mean_name(row["ffn"], metric)):
                values = found.setdefault(name, [])
                if _is_there(row.get(metric)):
                    values.append(row[metric])
    return {
        name: math.fsum(values) / len(values) if values else math.nan
        for name, values in found.items()
    }


def layer_name(ffn: str, layer: int, metric: str) -> str:
    """`ffn/03/pr_post`: a metric of one layer."""
    return f"{ffn}/{layer:02d}/{metric}"


def monitored_values(rows: Rows) -> dict[str, float]:
    """What callbacks can monitor: the means of `mean_values`, and each metric of each layer,
    `ffn/03/pr_post`; NaN where nothing could be measured."""
    rows = list(rows)
    layers = {
        layer_name(row["ffn"], row["layer"], metric): row.get(metric)
        for row in rows
        for metric in MEASURED
    }
    return mean_values(rows) | {
        name: math.nan if value is None else value for name, value in layers.items()
    }


def logged_values(rows: Rows) -> dict[str, float]:
    """What loggers get: each metric of each layer, `ffn/03/pr_post`, and its `ffn/mean/pr_post`.

    What could not be measured is left out.

    Args:
        rows: of one measurement, as in the `metrics` table.
    """
    values = monitored_values(rows)
    return {
        name: value for name, value in values.items() if name not in MEASURED and _is_there(value)
    }


def _is_there(value: float | None) -> bool:
    return value is not None and not math.isnan(value)
