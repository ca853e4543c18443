"""The notebook of comparisons: executed on fresh runs, and stored with outputs that match it."""

import base64
import io
import itertools
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nbformat
import numpy as np
import pytest
from matplotlib.image import imread
from nbclient import NotebookClient
from scipy import stats

import nerve
from notebooks import assert_small_and_without_places, stored_cells

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "compare.ipynb"
FIGURES = ("overview", "curves", "scatter", "layers")


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    """The committed cells, by id."""
    return stored_cells(NOTEBOOK)


@pytest.fixture(scope="module")
def executed(trained_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The cells after execution on eight fresh runs, by id."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in tags(cell))
    parameters.source = f"outputs = {str(trained_runs)!r}"
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        # No kernel, profile or history of the user's.
        patch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    return {cell["id"]: cell for cell in notebook.cells}


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def kinds(cell: Any) -> list[tuple[str, list[str]]]:
    """The type of each output of a cell, and its representations."""
    return [(output.output_type, sorted(output.get("data", {}))) for output in cell.outputs]


def table(cell: Any) -> list[list[str]]:
    """The texts of the table below a cell, row by row; the first is that of the index."""
    (output,) = cell.outputs
    (markup,) = re.findall("<table.*</table>", output.data["text/html"], re.DOTALL)
    rows = ElementTree.fromstring(markup).iter("tr")
    return [["".join(part.itertext()) for part in row] for row in rows]


def numbers(cell: Any, name: str) -> list[float]:
    """The row with this name in the table below a cell."""
    (found,) = (row for row in table(cell) if row[0] == name)
    return [float(text) for text in found[1:]]


def test_every_cell_runs_on_fresh_runs_and_gives_what_the_stored_one_gave(executed, stored):
    """Nothing is written to stderr: a warning would be an additional output."""
    code = {name: cell for name, cell in executed.items() if cell.cell_type == "code"}
    assert 10 <= len(code) <= 14
    for name, cell in code.items():
        assert kinds(cell) == kinds(stored[name]), name


def test_all_fresh_runs_are_named_with_their_factors_and_can_be_compared(executed, trained_runs):
    head, *rows = table(executed["runs"])
    assert head[1:6] == ["run_id", "normalization.kind", "activation.name", "seed", "flag"]
    runs = nerve.load_runs(trained_runs)
    names = ["run_id", "normalization.kind", "activation.name", "seed"]
    expected = {(*map(str, run), "ok") for run in runs[names].itertuples(index=False)}
    assert {tuple(texts[1:6]) for texts in rows} == expected
    assert len(rows) == 8


def test_correlations_within_runs_are_medians_of_those_taken_by_hand(executed, trained_runs):
    """Six steps from 0 to 50; the warm-up, 5% of them, ends before the second."""
    metrics = nerve.load_metrics(trained_runs)
    expected: dict[str, list[float]] = {"all": [], "after_warmup": [], "differences": []}
    for _, run in metrics.groupby("run_id"):
        steps = run.groupby("step")[["pr_post", "val_loss"]].mean()
        assert steps.index.tolist() == [0, 10, 20, 30, 40, 50]
        late = steps.iloc[1:]
        windows = {"all": steps, "after_warmup": late, "differences": late.diff().iloc[1:]}
        for window, values in windows.items():
            expected[window].append(np.corrcoef(values.to_numpy().T)[0, 1])
    summaries = [f(values) for values in expected.values() for f in (np.median, min, max)]
    assert numbers(executed["within"], "pr_post") == pytest.approx(summaries, abs=0.0051)


def test_correlations_across_runs_and_designs_are_those_of_their_last_steps(executed, trained_runs):
    metrics = nerve.load_metrics(trained_runs, ["activation.name", "normalization.kind"])
    last = metrics[metrics["step"] == 50]
    found = numbers(executed["across"], "se_post")
    for i, by in enumerate([["run_id"], ["activation.name", "normalization.kind"]]):
        values = last.groupby(by)[["se_post", "val_loss"]].mean()
        pearson = stats.pearsonr(values["se_post"], values["val_loss"])
        interval = pearson.confidence_interval()
        spearman = stats.spearmanr(values["se_post"], values["val_loss"]).statistic
        expected = [len(values), pearson.statistic, interval.low, interval.high, spearman]
        assert found[5 * i : 5 * i + 5] == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_images_with_something_on_them(executed, name):
    (output,) = executed[name].outputs
    image = imread(io.BytesIO(base64.b64decode(output.data["image/png"])))
    height, width, _ = image.shape
    assert width > 700
    assert height > 250
    dark = (image[..., :3].min(axis=-1) < 0.5).mean()
    assert 0.005 < dark < 0.5


def test_the_stored_notebook_was_executed_from_top_to_bottom_without_an_error(stored):
    code = [cell for cell in stored.values() if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert all(
            output.output_type in ("execute_result", "display_data") for output in cell.outputs
        )
    for name in (*FIGURES, "runs", "designs", "within", "across"):
        assert stored[name].outputs, name


def test_the_stored_notebook_is_small_and_knows_no_place_on_a_machine(stored):
    (parameters,) = (cell for cell in stored.values() if "parameters" in tags(cell))
    assert parameters.source == 'outputs = "../study/runs/normfree_gpu"'
    assert_small_and_without_places(NOTEBOOK)


def test_each_code_cell_is_short_and_has_its_sentence_before_it(stored):
    cells = list(stored.values())
    for before, cell in itertools.pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"
            assert len(cell.source.splitlines()) <= 12
