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
from nerve.metric_names import GROUP_SITES, GROUPED, SITES, STORED

SCHEMA_VERSION = 2
"""Written into each part. 2 added the columns from `variance_outside` to `position_ratio_post`."""
VERSION_KEY = b"nerve_schema_version"


def _schema(*columns: pa.Field) -> pa.Schema:
    return pa.schema(columns, metadata={VERSION_KEY: str(SCHEMA_VERSION)})


def _always(name: str, kind: pa.DataType) -> pa.Field:
    """A column that every row must fill."""
    return pa.field(name, kind, nullable=False)


def _measured(*names: str) -> list[pa.Field]:
    """Columns that are null where nothing valid could be measured."""
    return [pa.field(name, pa.float64()) for name in names]


METRICS = _schema(
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
"""One row a measured FFN and step: the metrics of the catalogue that are stored, losses, `lr` (that
of the hidden weights), `status` ("ok" or why metrics are null), `precision` (the way that the
covariances took; `projected_bfloat16` or `projected_float16` where pre was computed from the FFN's
input without its own rounding to that type). `variance_*` is the trace of the covariance.

Shares, each in [0, 1], of what the spectrum alone cannot show:

- `variance_outside`: of post's variance, the share outside the span of pre, `1 - tr(P C_post) /
  tr(C_post)`, with P the projector onto the columns of the up (or gate) weight. Null where no
  weight says what pre can reach.
- `largest_share_*`: of all variance, the share of the single sample that is farthest from the mean.
  Near 1, the spectrum is that of one sample.
- `top_share_*`: the same of the farthest 0.1% of the samples together.
- `mean_share_*`: of the second moment, the share of the mean. Covariances are centered, so they
  cannot see features that collapse to one vector; there it is 1.
"""

SPECTRA = _schema(
    _always("run_id", pa.string()),
    _always("step", pa.int64()),
    _always("layer", pa.int16()),
    _always("ffn", pa.string()),
    _always("site", pa.string()),
    # "element" is the name that Parquet itself prescribes for the items of a list.
    _always("eigenvalues", pa.list_(pa.field("element", pa.float32()))),
)
"""One row a measured FFN, step and site (pre | post)."""

SCALARS = _schema(
    _always("run_id", pa.string()),
    _always("step", pa.int64()),
    _always("name", pa.string()),
    pa.field("value", pa.float64()),
)
"""One row a logged value."""


GROUPS = _schema(
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
"""One row a measured FFN, step, site (stream_in | input | pre | post | output | stream_out),
grouping (all | position | frequency | halves) and group. `dim` is the number of features of the
site; `se_spread` and its like times 1/√N are the standard error of N independent samples."""


@dataclass(frozen=True)
class Dataset:
    """A folder of parts.

    Attributes:
        name: of the folder.
        schema: its columns.
        key: the columns that tell rows apart.
        sites: the values of the column `site`, where there is one.
        is_optional: whether the folder is there only once it has rows.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    sites: tuple[str, ...] = ()
    is_optional: bool = False


DATASETS = {
    "metrics": Dataset("metrics", METRICS, ("run_id", "step", "layer", "ffn")),
    "spectra": Dataset("spectra", SPECTRA, ("run_id", "step", "layer", "ffn", "site"), SITES),
    "scalars": Dataset("scalars", SCALARS, ("run_id", "step", "name")),
    "groups": Dataset(
        "groups",
        GROUPS,
        ("run_id", "step", "layer", "ffn", "site", "grouping", "group"),
        GROUP_SITES,
        is_optional=True,
    ),
}


def table_of(dataset: Dataset, rows: Iterable[Mapping[str, Any]], run_id: str) -> pa.Table:
    """Rows as a table of exactly the dataset's schema; NaN becomes null.

    `run_id` fills that column; a row may leave it and every nullable column out.

    Raises:
        StoreError: for a row with an unknown column, without a required one, of another run, or
            with a value that its column cannot hold exactly; the column is named.
    """
    rows = list(rows)
    required = [field.name for field in dataset.schema if not field.nullable]
    for row in rows:
        unknown = sorted(row.keys() - set(dataset.schema.names))
        if unknown:
            raise StoreError(
                f"A row of {dataset.name} has the columns {', '.join(dataset.schema.names)}; got "
                f"also {', '.join(map(str, unknown))}. Leave these out, or log them as scalars."
            )
        missing = [name for name in required if name != "run_id" and row.get(name) is None]
        if missing:
            raise StoreError(
                f"A row of {dataset.name} needs {', '.join(required)}; {', '.join(missing)} is "
                f"missing or None in {dict(row)!r:.300}. Give it a value."
            )
        if row.get("run_id", run_id) != run_id:
            raise StoreError(
                f"A store holds the rows of one run; this is {run_id!r} and a row of "
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
            # Arrow alone would cut 1.5 down to 1.
            return pa.array([operator.index(value) for value in values], field.type)
        if pa.types.is_list(field.type):
            return pa.array([_eigenvalues(value) for value in values], field.type)
        if field.name == "site" and not set(values) <= set(dataset.sites):
            raise ValueError(f"a site is {' or '.join(dataset.sites)}, got {sorted(set(values))}")
        array = pa.array(values, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise StoreError(
            f"{dataset.name}.{field.name} holds {field.type}; a row's value does not fit: {error}. "
            "Convert it before it is stored."
        ) from error
    if pa.types.is_floating(field.type):
        return pc.if_else(pc.is_nan(array), pa.scalar(None, field.type), array)
    return array


def _eigenvalues(value: Any) -> np.ndarray:
    array = np.asarray(value, dtype=np.float32)
    if array.ndim != 1:
        raise ValueError(f"a spectrum has one dimension, got shape {array.shape}")
    if np.isnan(array).any():
        raise ValueError("a spectrum that holds NaN is no measurement")
    return array


def check_version(path: Path, metadata: dict[bytes, bytes] | None) -> None:
    """Raises `StoreError` for a file whose columns may mean what this version cannot know."""
    version = int((metadata or {}).get(VERSION_KEY, b"1"))
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"This nerve reads schema versions up to {SCHEMA_VERSION}; {path} has version "
            f"{version}. Install the nerve that wrote it, or a newer one."
        )


def fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with the columns of `schema`. Raises `KeyError` where a required one is missing."""
    if table.schema.equals(schema):
        return table  # hardly any file needs more, and casting costs as much as reading
    lacks = [field for field in schema if field.name not in table.schema.names]
    required = [field.name for field in lacks if not field.nullable]
    if required:
        raise KeyError(f"it lacks the columns {', '.join(required)}")
    for field in lacks:
        table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names).cast(schema)


def encoding_of(schema: pa.Schema) -> dict[str, Any]:
    """How a part's columns are encoded, for `pyarrow.parquet.write_table`.

    Measured numbers hardly repeat: a dictionary would make them larger and slower to read, and zstd
    no smaller. What repeats is LZ4, as small as zstd there: zstd makes a context for each column,
    which takes longer than all that it unpacks.
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
    """The path in a file's schema of a column, or of the items of one of lists."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
