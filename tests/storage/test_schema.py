"""The columns are those that readers rely on, and only rows that fit them are accepted."""

import numpy as np
import pyarrow as pa
import pytest

from nerve.errors import StoreError
from nerve.storage.schema import (
    DATASETS,
    GROUPS_SCHEMA,
    METRICS_SCHEMA,
    SCALARS_SCHEMA,
    SPECTRA_SCHEMA,
    table_of,
)

SPECTRUM = {"step": 1, "layer": 0, "ffn": "ffn", "site": "pre", "eigenvalues": [2.0, 1.0]}


def test_metrics_columns_and_types():
    """The table of metrics is exactly this, in this order."""
    sites = [f"{name}_{site}" for name in ("se", "pr", "eee") for site in ("pre", "post")]
    others = ["variance_pre", "variance_post", "pr_pre_corrected", "pr_post_corrected"]
    shares = [
        f"{name}_{site}"
        for name in ("largest_share", "top_share", "mean_share", "position_ratio")
        for site in ("pre", "post")
    ]
    added = ["variance_outside", *shares]
    floats = [*sites, "js", *others, *added, "train_loss", "val_loss", "lr"]
    expected = {
        "run_id": pa.string(),
        "step": pa.int64(),
        "tokens_seen": pa.int64(),
        "layer": pa.int16(),
        "ffn": pa.string(),
        "n_samples": pa.int64(),
        "d_ff": pa.int32(),
        "d_in": pa.int32(),
        **dict.fromkeys(floats, pa.float64()),
        "precision": pa.string(),
        "status": pa.string(),
    }
    assert dict(zip(METRICS_SCHEMA.names, METRICS_SCHEMA.types, strict=True)) == expected
    assert METRICS_SCHEMA.names == list(expected)
    assert all(METRICS_SCHEMA.field(name).nullable for name in floats)


def test_spectra_and_scalars_columns_and_types():
    """The eigenvalues are lists of float32; a scalar is a name and a float64."""
    assert SPECTRA_SCHEMA.names == ["run_id", "step", "layer", "ffn", "site", "eigenvalues"]
    assert SPECTRA_SCHEMA.field("eigenvalues").type.value_type == pa.float32()
    assert SCALARS_SCHEMA.names == ["run_id", "step", "name", "value"]
    assert SCALARS_SCHEMA.field("value").type == pa.float64()


def test_groups_columns_and_types():
    """One row per site and group of a measured FFN."""
    measured = ["se", "pr", "eee", "variance", "pr_corrected"]
    measured += ["se_spread", "pr_spread", "eee_spread"]
    expected = {
        "run_id": pa.string(),
        "step": pa.int64(),
        "layer": pa.int16(),
        **dict.fromkeys(("ffn", "site", "grouping", "group"), pa.string()),
        "n_samples": pa.int64(),
        "dim": pa.int32(),
        **dict.fromkeys(measured, pa.float64()),
        "status": pa.string(),
    }
    assert dict(zip(GROUPS_SCHEMA.names, GROUPS_SCHEMA.types, strict=True)) == expected
    assert GROUPS_SCHEMA.names == list(expected)


@pytest.mark.parametrize("schema", [METRICS_SCHEMA, SPECTRA_SCHEMA, SCALARS_SCHEMA, GROUPS_SCHEMA])
def test_version_is_in_the_metadata(schema):
    assert schema.metadata == {b"nerve_schema_version": b"2"}


@pytest.mark.parametrize("nan", [float("nan"), np.float32("nan"), np.float64("nan"), None])
def test_nan_becomes_null(row, nan):
    """NaN never remains in a metric; the row itself remains, with its status."""
    table = table_of(DATASETS["metrics"], [row(1, se_pre=nan, status="no variance")], "a")
    assert table["se_pre"].to_pylist() == [None]
    assert table["se_post"].to_pylist() == [1.5]
    assert table["status"].to_pylist() == ["no variance"]


def test_absent_nullable_columns_are_null(row):
    without = {name: value for name, value in row(1).items() if name not in ("lr", "precision")}
    table = table_of(DATASETS["metrics"], [without], "a")
    assert table["lr"].null_count == table["precision"].null_count == 1
    assert table["run_id"].to_pylist() == ["a"]


def test_spectra_take_arrays_and_round_to_float32():
    values = np.array([3.0, 1 / 3, 0.0])
    table = table_of(DATASETS["spectra"], [{**SPECTRUM, "eigenvalues": values}], "a")
    assert table.schema.equals(SPECTRA_SCHEMA, check_metadata=True)
    np.testing.assert_array_equal(table["eigenvalues"][0].values, values.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"perplexity": 3.0}, "perplexity"),
        ({"layer": None}, "layer"),
        ({"layer": 1.5}, "layer"),
        ({"layer": 40_000}, "layer"),
        ({"step": "10"}, "step"),
        ({"step": 2**70}, "step"),
        ({"se_pre": "high"}, "se_pre"),
        ({"ffn": 3}, "ffn"),
        ({"status": None}, "status"),
        ({"run_id": "beef"}, "beef"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_name(row, change, named):
    """Including 1.5 as a layer, which Arrow itself would truncate to 1."""
    with pytest.raises(StoreError, match=named):
        table_of(DATASETS["metrics"], [row(1), row(2) | change], "cafe")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eigenvalues": [1.0, float("nan")]}, "NaN"),
        ({"eigenvalues": [[1.0], [2.0]]}, "one dimension"),
        ({"eigenvalues": None}, "eigenvalues"),
        ({"site": "post_activation"}, "pre or post"),
    ],
)
def test_a_spectrum_that_cannot_be_one_is_refused(change, named):
    with pytest.raises(StoreError, match=named):
        table_of(DATASETS["spectra"], [{**SPECTRUM, **change}], "cafe")


def test_a_missing_key_is_named(row):
    incomplete = {name: value for name, value in row(1).items() if name != "d_ff"}
    with pytest.raises(StoreError, match="d_ff is missing"):
        table_of(DATASETS["metrics"], [incomplete], "a")
