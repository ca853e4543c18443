"""Everything that nerve does with a metric follows from its entry; a measurement as named
numbers."""

import ast
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from new_metric import walk
from processes import ended, start
from torch import nn

import nerve
from nerve import FFNAdapter, final_metrics, load_metrics, measure
from nerve.metric_names import CATALOG, DERIVED, MEASURED, STORED, metric_of
from nerve.recording.writer import logged_values, mean_values
from nerve.report.one_run import content_of_run
from nerve.report.several_runs import content_of_runs
from nerve.sites_and_groups import SITES
from nerve.spectra.metrics import OF_ONE_SPECTRUM, OF_TWO_SPECTRA
from nerve.storage.schema import METRICS_SCHEMA


def row(layer: int, ffn: str = "ffn", **values: float | None) -> dict:
    return {"layer": layer, "ffn": ffn, **dict.fromkeys(MEASURED, 1.0), **values}


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    """A linear layer followed by a ReLU, measured on 200 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6))
    ffn = FFNAdapter(0, "ffn", model[0], model[2])
    return measure(model, [torch.randn(10, 20, 6)], ffns=[ffn])


def test_the_stored_metrics_are_columns_in_the_order_of_the_catalog():
    assert [name for name in METRICS_SCHEMA.names if metric_of(name)] == list(STORED)
    assert len(set(STORED + DERIVED)) == len(STORED + DERIVED)
    assert set(MEASURED) <= set(STORED)


def test_measured_and_derived_columns_are_those_of_the_catalog(measured):
    """Every metric has a function, and every function a metric."""
    others = {*METRICS_SCHEMA.names, "outliers", "sampling"} - set(STORED)
    assert [name for name in measured if name not in others] == [
        *STORED,
        *(name for name in measured if name in DERIVED),
    ]
    assert set(DERIVED) <= set(measured)
    functions = {*OF_TWO_SPECTRA, *(n.format(site=s) for n in OF_ONE_SPECTRUM for s in SITES)}
    assert functions <= set(STORED)


def test_a_measurement_is_within_the_bounds_of_the_catalog(measured):
    for metric in CATALOG:
        low, high = metric.bounds
        assert all(low <= measured[name][0] <= high for name in metric.columns), metric


@pytest.mark.parametrize("metric", [m for m in CATALOG if m.at_most or m.at_least])
def test_a_flat_spectrum_of_a_rank_is_at_the_limit_of_the_catalog(metric):
    """Rank 6 of 16, the extreme of SE, PR and EEE; any other spectrum of that rank is within the
    limit."""
    flat = torch.tensor([1.0] * 6 + [0.0] * 10, dtype=torch.float64)
    sloped = flat * torch.arange(16, 0, -1)
    of = OF_ONE_SPECTRUM[metric.column]
    limit = (metric.at_most or metric.at_least)(6, 16)
    assert float(of(flat, 100)) == pytest.approx(limit, rel=1e-12)
    assert (float(of(sloped, 100)) < limit) == (metric.at_most is not None)


def test_every_metric_is_described_for_users():
    """Stored ones in the README or the pages, as `pr_post` or `mean_share_*`; derived ones in the
    docstring of the loader."""
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *sorted(root.glob("docs/**/*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for metric in CATALOG:
        for column in metric.columns:
            if metric.stored:
                assert f"`{column}`" in text or f"`{metric.at('*')}`" in text
            else:
                assert column in (load_metrics.__doc__ or "")


def test_no_other_file_lists_metrics():
    """Three consecutive metric columns, except in keywords and comparisons, count as a list."""
    package, columns = Path(nerve.__file__).parent, {*STORED, *DERIVED}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                names = [item.value for item in node.elts if isinstance(item, ast.Constant)]
                assert len(columns.intersection(names)) < 3, f"{path}:{node.lineno}"


def test_rows_that_were_stored_without_the_later_columns_are_compared_and_reported(
    tables, tmp_path
):
    """These columns are null in every row; warnings are errors."""
    later = [name for name in STORED if "share" in name or name == "variance_outside"]
    missing = dict.fromkeys(later)
    rows = [{"step": step, "val_loss": 5.0 - step, **missing} for step in (0, 1, 2)]
    metrics, runs = tables({"rows": rows}, {"rows": rows, "config": {"activation.name": "relu"}})
    points = final_metrics(metrics, runs)
    assert points[["variance_outside", "mean_share_post"]].isna().all(axis=None)
    assert points["pr_gain"].tolist() == [2.5, 2.5]
    assert math.isnan(mean_values(metrics.to_dict("records"))["variance_outside"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nerve.IncompleteWarning)  # no spectra, no scalars
        contents = [
            content_of_run(nerve.Runs(tmp_path / "run0"), "all"),
            content_of_runs(nerve.Runs(tmp_path), "all", "two"),
        ]
    for content in contents:
        for drawing in content.drawings:
            drawing.draw()
        for table in content.tables:
            if table.name in ("layers", "designs", "equal_loss"):
                assert not set(later).intersection(table.shown or ())


NEW_FUNCTION = """
def largest_eigenvalue_share(eigenvalues):
    return _shares(eigenvalues).amax(-1)


OF_ONE_SPECTRUM = {
    **OF_ONE_SPECTRUM,
    "first_{site}": lambda spectrum, n_samples: largest_eigenvalue_share(spectrum),
}
"""
NEW_ENTRY = """    Metric(
        "first_{site}",
        "first",
        "share of the variance",
        "share of the largest eigenvalue",
        logged=True,
        compared=True,
        correlated=True,
        shown=("summary", "overview", "curves", "scatter", "tables", "depth"),
    ),
"""


def test_a_new_metric_is_one_function_and_one_entry(tmp_path):
    """In a copy of the package, from the measurement to the summary, the frames and the reports."""
    shutil.copytree(Path(nerve.__file__).parent, tmp_path / "nerve")
    functions = tmp_path / "nerve" / "spectra" / "metrics.py"
    functions.write_text(functions.read_text(encoding="utf-8") + NEW_FUNCTION, encoding="utf-8")
    catalog = tmp_path / "nerve" / "metric_names.py"
    text = catalog.read_text(encoding="utf-8")
    last = text.index('    Metric(\n        "rank_limit_')
    catalog.write_text(text[:last] + NEW_ENTRY + text[last:], encoding="utf-8")
    log = tmp_path / "log"
    environment = os.environ | {"COLUMNS": "120"}
    process = start(walk, str(tmp_path), cwd=tmp_path, log=log, environment=environment)
    status, told = ended(process), log.read_text()
    assert status == 0, told
    assert "first_post" in told
    for folder in (tmp_path, tmp_path / "runs"):  # of both runs, and of one
        page = (folder / "report" / "index.html").read_text(encoding="utf-8")
        assert "first_post" in page


def test_the_catalog_is_read_without_torch_and_pandas():
    code = "import sys, nerve.metric_names; assert not {'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_each_layer_has_a_name_and_their_mean_another():
    values = logged_values(row(layer, pr_post=float(layer)) for layer in (0, 3, 12))
    assert (values["ffn/00/pr_post"], values["ffn/12/pr_post"]) == (0.0, 12.0)
    assert values["ffn/mean/pr_post"] == 5.0
    assert len(values) == 4 * len(MEASURED)


def test_a_mixer_has_means_of_each_kind_and_of_all():
    rows = [
        row(layer, ffn, se_pre=se)
        for ffn, ses in (("token_mixing", (1.0, 3.0)), ("channel_mixing", (5.0, 7.0)))
        for layer, se in enumerate(ses)
    ]
    means = mean_values(rows)
    assert means["se_pre"] == 4.0
    assert means["token_mixing/mean/se_pre"] == 2.0
    assert means["channel_mixing/mean/se_pre"] == 6.0
    assert logged_values(rows)["token_mixing/01/se_pre"] == 3.0


@pytest.mark.parametrize("missing", [None, math.nan])
def test_missing_values_do_not_count(missing):
    """As in rows: None when they are created, NaN when they are read."""
    rows = [row(0, js=missing, pr_pre=missing), row(1, js=0.5, pr_pre=missing)]
    means, values = mean_values(rows), logged_values(rows)
    assert means["js"] == means["ffn/mean/js"] == values["ffn/mean/js"] == 0.5
    assert math.isnan(means["pr_pre"])
    assert math.isnan(means["ffn/mean/pr_pre"])
    assert values.keys().isdisjoint({"ffn/00/js", "ffn/00/pr_pre", "ffn/mean/pr_pre"})
