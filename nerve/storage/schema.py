"""The columns of the four Parquet datasets of a run, and rows checked against them."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nerve.errors import StoreError
from nerve.metric_names import DERIVED, GROUPED, STORED
from nerve.sites_and_groups import GROUP_SITES, SITES

SCHEMA_VERSION = 2
"""Stored in each part. Version 2 added `variance_outside` to `position_ratio_post`."""
VERSION_KEY = b"nerve_schema_version"


def _schema(*columns: pa.Field) -> pa.Schema:
    return pa.schema(columns, metadata={VERSION_KEY: str(SCHEMA_VERSION)})


def _always(name: str, kind: pa.DataType) -> pa.Field:
    """A column that must not be null."""
    return pa.field(name, kind, nullable=False)


def _measured(*names: str) -> list[pa.Field]:
    """Columns that are null if nothing valid could be measured."""
    return [pa.field(name, pa.float64()) for name in names]


METRICS_SCHEMA = _schema(
    _always("run_id", pa.string()),
    _always("step", pa.int64()),
    _always("tokens_seen", pa.int64()),
    _always("layer", pa.int16()),
    _always("ffn", pa.string()),
    _always("n_samples", pa.int64()),
    _always("d_ff", pa.int32()),
    _always("d_in", pa.int32()),
    *_measured(*STORED, "train_loss", "val_loss", "lr"),
    pa.field("precision", pa.string()),
    _always("status", pa.string()),
)
"""One row per measured FFN and step: the stored metrics of the catalog, losses, `lr` (of the hidden
weights), `status` ("ok", or the reason why metrics are null) and `precision` (how the covariances
were computed; `projected_bfloat16` or `projected_float16` if pre was computed from the FFN's input
without its own rounding to that type). `variance_*` is the trace of the covariance.

What the spectrum alone cannot show, all but the last of it shares in [0, 1]:

- `variance_outside`: the share of post's variance outside the span of pre, `1 - tr(P C_post) /
  tr(C_post)`, where P projects onto the columns of the up (or gate) weight. Null if no weight
  determines the span of pre.
- `largest_share_*`: the share of the total variance due to the single sample farthest from the
  mean. Near 1, the spectrum is that of one sample.
- `top_share_*`: the same for the farthest 0.1% of the samples together.
- `mean_share_*`: the mean's share of the second moment. It is 1 if the features collapse to one
  vector, which centered covariances cannot show.
- `position_ratio_*`: the mean squared distance from the mean at one sequence position, divided by
  that of all samples, at the position where this is largest. 1 if all positions are alike; null
  without positions.
"""

SPECTRA_SCHEMA = _schema(
    _always("run_id", pa.string()),
    _always("step", pa.int64()),
    _always("layer", pa.int16()),
    _always("ffn", pa.string()),
    _always("site", pa.string()),
    # Parquet prescribes the name "element" for the items of a list.
    _always("eigenvalues", pa.list_(pa.field("element", pa.float32()))),
)
"""One row per measured FFN, step and site (pre | post)."""

SCALARS_SCHEMA = _schema(
    _always("run_id", pa.string()),
    _always("step", pa.int64()),
    _always("name", pa.string()),
    pa.field("value", pa.float64()),
)
"""One row per logged value."""


GROUPS_SCHEMA = _schema(
    _always("run_id", pa.string()),
    _always("step", pa.int64()),
    _always("layer", pa.int16()),
    _always("ffn", pa.string()),
    _always("site", pa.string()),
    _always("grouping", pa.string()),
    _always("group", pa.string()),
    _always("n_samples", pa.int64()),
    _always("dim", pa.int32()),
    *_measured(*GROUPED),
    _always("status", pa.string()),
)
"""One row per measured FFN, step, site (stream_in | input | pre | post | output | stream_out),
grouping (all | position | frequency | halves) and group. `dim` is the number of features of the
site; `se_spread` and similar columns, times 1/√N, are the standard error for N independent
samples."""


@dataclass(frozen=True)
class Dataset:
    """A folder of parts.

    Attributes:
        name: name of the folder.
        schema: its columns.
        key: the columns that identify a row.
        sites: the possible values of the column `site`, if there is one.
        is_optional: whether the folder is only created when it has rows.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    sites: tuple[str, ...] = ()
    is_optional: bool = False


METRIC_COLUMNS = frozenset(
    (*METRICS_SCHEMA.names, *DERIVED, "outliers", "sampling", "n_damaged_parts")
)
"""The columns of `nerve.load_metrics` without those of the run; no factor can have their names."""


DATASETS = {
    "metrics": Dataset("metrics", METRICS_SCHEMA, ("run_id", "step", "layer", "ffn")),
    "spectra": Dataset(
        "spectra", SPECTRA_SCHEMA, ("run_id", "step", "layer", "ffn", "site"), SITES
    ),
    "scalars": Dataset("scalars", SCALARS_SCHEMA, ("run_id", "step", "name")),
    "groups": Dataset(
        "groups",
        GROUPS_SCHEMA,
        ("run_id", "step", "layer", "ffn", "site", "grouping", "group"),
        GROUP_SITES,
        is_optional=True,
    ),
}


def table_of(dataset: Dataset, rows: Iterable[Mapping[str, Any]], run_id: str) -> pa.Table:
    """Converts rows to a table with exactly the dataset's schema; NaN becomes null.

    A row may omit `run_id`, which is filled in, and every nullable column.

    Raises:
        StoreError: for a row of another run, with an unknown column, without a required column, or
            with a value that its column cannot hold exactly; the message names the column.
    """
    rows = list(rows)
    required = [field.name for field in dataset.schema if not field.nullable]
    for row in rows:
        unknown = sorted(row.keys() - set(dataset.schema.names))
        if unknown:
            raise StoreError(
                f"A row of {dataset.name} has the columns {', '.join(dataset.schema.names)}; got "
                f"also {', '.join(map(str, unknown))}. Omit these, or log them as scalars."
            )
        missing = [name for name in required if name != "run_id" and row.get(name) is None]
        if missing:
            raise StoreError(
                f"A row of {dataset.name} needs {', '.join(required)}; {', '.join(missing)} is "
                f"missing or None in {dict(row)!r:.300}. Set it."
            )
        if row.get("run_id", run_id) != run_id:
            raise StoreError(
                f"A store holds the rows of one run; this is the store of {run_id!r}, and a row of "
                f"{dataset.name} has run_id {row['run_id']!r}. Open the other run's own store."
            )
    columns = {
        field.name: [run_id] * len(rows)
        if field.name == "run_id"
        else [row.get(field.name) for row in rows]
        for field in dataset.schema
    }
    arrays = [_column(dataset, field, columns[field.name]) for field in dataset.schema]
    return pa.Table.from_arrays(arrays, schema=dataset.schema)


def _column(dataset: Dataset, field: pa.Field, values: list[Any]) -> pa.Array:
    try:
        if pa.types.is_integer(field.type):
            # Arrow itself would truncate 1.5 to 1.
            return pa.array([operator.index(value) for value in values], field.type)
        if pa.types.is_list(field.type):
            return pa.array([_eigenvalues(value) for value in values], field.type)
        if field.name == "site" and not set(values) <= set(dataset.sites):
            raise ValueError(
                f"site must be {' or '.join(dataset.sites)}, got {sorted(set(values))}"
            )
        array = pa.array(values, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise StoreError(
            f"{dataset.name}.{field.name} must be {field.type}; a row has another value: {error}. "
            "Convert it before you store it."
        ) from error
    if pa.types.is_floating(field.type):
        return pc.if_else(pc.is_nan(array), pa.scalar(None, field.type), array)
    return array


def _eigenvalues(value: Any) -> np.ndarray:
    array = np.asarray(value, dtype=np.float32)
    if array.ndim != 1:
        raise ValueError(f"a spectrum must have one dimension, got shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError("a spectrum must not contain NaN")
    return array


def check_version(path: Path, metadata: dict[bytes, bytes] | None) -> None:
    """Raises `StoreError` for a file of a newer version, whose columns may have other meanings."""
    version = int((metadata or {}).get(VERSION_KEY, b"1"))
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"This nerve reads schema versions up to {SCHEMA_VERSION}; {path} has version "
            f"{version}. Install the nerve that wrote it, or a newer one."
        )


def fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with the columns of `schema`. Raises `KeyError` if a required column is missing."""
    if table.schema.equals(schema):
        return table  # the usual case; casting takes as long as reading
    lacks = [field for field in schema if field.name not in table.schema.names]
    required = [field.name for field in lacks if not field.nullable]
    if required:
        raise KeyError(f"it lacks the columns {', '.join(required)}")
    for field in lacks:
        table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names).cast(schema)


def encoding_of(schema: pa.Schema) -> dict[str, Any]:
    """How a part's columns are encoded, as arguments of `pyarrow.parquet.write_table`.

    Measured numbers hardly repeat: a dictionary would make them larger and slower to read, and zstd
    no smaller. Columns with repeated values use LZ4, which compresses them as well as zstd: zstd
    creates a context for each column, which takes longer than decompressing it.
    """
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    measured = {*STORED, *GROUPED}
    compressed = {
        _path_of(field): "zstd" if pa.types.is_list(field.type) else "lz4"
        for field in schema
        if field.name not in measured
    }
    return {"compression": compressed, "use_dictionary": texts}


def _path_of(field: pa.Field) -> str:
    """The path of a column in a file's schema; for a column of lists, that of their items."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
