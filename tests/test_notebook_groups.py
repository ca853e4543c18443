"""The notebook of groups: executed on a fresh run with groups and sites, and stored as executed."""

import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from support import TINY_RUN, as_before

import nerve
from nerve.sites_and_groups import GROUP_SITES, GROUPINGS
from notebooks import assert_small_and_without_places, stored_cells

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "groups.ipynb"
ASKED = (
    "monitor.groups=[position,frequency,halves]",
    "monitor.sites=[stream_in,input,output,stream_out]",
    "monitor.groups_every=2",
    "monitor.n_tokens=512",
)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    """The committed cells, by id."""
    return stored_cells(NOTEBOOK)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps that measures everything at steps 0 and 4, and no groups at 2 and 5."""
    from nerve.cli.run import main  # after the import hook

    folder = tmp_path_factory.mktemp("groups") / "run"
    with pytest.MonkeyPatch.context() as patch, as_before():
        patch.chdir(folder.parent)
        patch.setattr(sys, "argv", ["nerve-run", *TINY_RUN, *ASKED, f"hydra.run.dir={folder}"])
        main()
    return folder


def test_a_run_stores_groups_and_sites_with_every_second_measurement(run):
    groups = nerve.load_groups(run, ["activation.name"])
    assert sorted(groups["step"].unique()) == [0, 4]
    assert set(groups["site"]) == {*GROUP_SITES}
    assert set(groups["grouping"]) == {"all", *GROUPINGS}
    assert set(groups["activation.name"]) == {"gelu"}
    # Of the first grouping the groups hold all samples but what equal numbers leave out.
    keys = ["step", "layer", "site"]
    position = groups[(groups["grouping"] == "position") & (groups["group"] != "like_0")]
    whole = groups[(groups["grouping"] == "all") & groups["site"].isin(["pre", "post"])]
    parts = position.groupby(keys)["n_samples"].sum()
    assert (parts <= whole.set_index(keys)["n_samples"]).all()
    assert nerve.load_metrics(run)["sampling"].notna().all()


def test_every_cell_runs_on_a_fresh_run_and_gives_what_the_stored_one_gave(run, stored, tmp_path):
    """Nothing is written to stderr: a warning would be an additional output."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = f"outputs = {str(run)!r}"
    with pytest.MonkeyPatch.context() as patch:
        # No kernel, profile or history of the user's.
        patch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
        patch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
        resources = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kinds, expected = (
                [(each.output_type, sorted(each.get("data", {}))) for each in outputs]
                for outputs in (cell.outputs, stored[cell["id"]].outputs)
            )
            assert kinds == expected, cell["id"]


def test_the_stored_notebook_was_executed_and_knows_no_place_on_a_machine(stored):
    code = [cell for cell in stored.values() if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert_small_and_without_places(NOTEBOOK)
