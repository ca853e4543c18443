"""The pages: their links exist, their commands compose, and their code runs as it is."""

import re
import shlex
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose
from omegaconf import OmegaConf
from support import PAGES, ROOT, example, examples, hydra_at_conf
from trained import llama, save, write_text

import nerve
from nerve.cli import probe, report
from nerve.cli.config.compose import CONF

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub creates for the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_links_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 130
    assert len(PAGES) == 8
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in readme


@every_page
def test_what_a_page_links_is_there(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_names_of_the_package_on_the_pages_are_there():
    text = "\n".join(page.read_text() for page in PAGES)
    names = set(re.findall(r"\bnerve\.([A-Za-z_]\w*)", text)) - {"spectra"}
    assert len(names) > 15
    assert names <= set(nerve.__all__)
    assert not re.search(r"from nerve|import nerve\.", text), "pages show names as nerve.NAME"
    (parts,) = re.findall(r"`nerve\.spectra` holds the parts:([^.]*)\.", text)
    for name in re.findall(r"`(\w+)`", parts):
        assert callable(getattr(import_module("nerve.spectra"), name))


def commands() -> list[list[str]]:
    """The arguments of each `nerve-run` on the pages, except those that resume a run."""
    lines = [line for block in examples("bash") for line in block.text.splitlines()]
    calls = [line.partition("nerve-run")[2] for line in lines if "nerve-run" in line]
    return [shlex.split(call, comments=True) for call in calls if "<run>" not in call]


def test_the_commands_of_the_pages_compose(tmp_path):
    """The first trial of each sweep; the user's own launcher is the YAML block of the page."""
    launcher = tmp_path / "cluster" / "hydra" / "launcher" / "ours.yaml"
    launcher.parent.mkdir(parents=True)
    launcher.write_text(example("yaml", "partition"))
    found = commands()
    assert len(found) > 10
    with hydra_at_conf():
        for arguments in found:
            name, overrides = "config", []
            for argument in arguments:
                if argument.startswith("--config-name="):
                    name = argument.partition("=")[2]
                elif argument.startswith("--config-dir="):
                    path = tmp_path / argument.partition("=")[2]
                    overrides.append(f"hydra.searchpath=[file://{path}]")
                elif argument != "-m":
                    key, _, values = argument.partition("=")
                    overrides.append(
                        f"{key}={values.split(',')[0] if '[' not in values else values}"
                    )
            config = compose(name, overrides, return_hydra_config=True)
            assert config.model.n_layers > 0, arguments


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table of a page whose first line starts with this text."""
    lines = iter((ROOT / "docs" / page).read_text().splitlines())
    assert any(line.startswith(head) for line in lines)
    next(lines)
    table = []
    for line in lines:
        if not line.startswith("|"):
            return table
        table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return table


def test_the_page_on_what_is_measured_names_each_column_of_the_loader(make_run, tmp_path):
    """And no column that does not exist; `*` stands for pre and post."""
    make_run(tmp_path / "run")
    page = (ROOT / "docs/measurement.md").read_text()
    page = page[: page.index("## Limits")]
    firsts = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [name for first in firsts for name in re.findall(r"`([\w*]+)`", first)]
    columns = {name.replace("*", site) for name in named for site in ("pre", "post")}
    corrected = {"pr_pre_corrected", "pr_post_corrected"}  # told among the limits
    assert columns == {*nerve.load_metrics(tmp_path).columns} - corrected


@pytest.mark.parametrize(
    ("page", "head", "overrides", "prefix"),
    [
        ("configuration.md", "| key |", [], ""),
        ("sweeps.md", "| `hydra.launcher.` |", ["hydra/launcher=slurm"], "hydra.launcher."),
    ],
)
def test_keys_on_the_pages_have_the_default_that_is_said(page, head, overrides, prefix):
    with hydra_at_conf():
        config = compose("config", overrides, return_hydra_config=True)
    missing = object()
    checked = 0
    for keys, default, _ in rows(page, head):
        for key in re.findall(r"`([^`]+)`", keys):
            value = OmegaConf.select(config, prefix + key, default=missing)
            if key not in ("hydra.run.dir", "model.n_layers"):
                assert value is not missing, key
            if re.fullmatch(r"[\d.e-]+", default):
                assert float(value) == float(default), key
                checked += 1
    assert checked >= 6


def test_the_table_of_factors_names_every_option_that_there_is():
    table = rows("configuration.md", "| group | options |")
    groups = {group.strip("`"): set(re.findall(r"`(\w+)`", options)) for group, options, _ in table}
    assert groups.keys() == {path.name for path in CONF.iterdir() if path.is_dir()} - {
        "hydra",
        "logger",
    }
    for group, options in groups.items():
        assert {path.stem for path in (CONF / group).glob("*.yaml")} <= options, group


def check_readme(found: SimpleNamespace) -> None:
    assert len(found.points) == 8
    ratios = found.metrics.assign(gain=found.metrics.pr_post / found.metrics.pr_pre)
    last = ratios[ratios.step == 50].groupby("run_id").gain.mean()
    points = found.points.set_index("run_id")
    np.testing.assert_allclose(points.pr_gain, last[points.index], rtol=1e-6)
    assert found.rows[["layer", "d_in", "d_ff"]].to_numpy().tolist() == [[0, 64, 256]]


def check_comparison(found: SimpleNamespace) -> None:
    assert len(found.points) == 8
    assert sorted(found.designs["activation.name"]) == ["gelu", "gelu", "relu", "relu"]


def check_own_model(found: SimpleNamespace) -> None:
    """Checks the rows of models with two blocks, measured once and in each loop, seven times."""
    assert found.rows["layer"].tolist() == [0, 1]
    measured = nerve.load_metrics("outputs/series", factors=["family"])
    assert measured["step"].tolist() == [0, 0, 1000, 1000]
    assert nerve.load_metrics("outputs/measured")["step"].tolist() == [1000, 1000]
    looped = nerve.load_metrics("outputs/loop", factors=["design"])
    assert looped["step"].tolist() == [0, 0, 10, 10, 20, 20, 25, 25]
    assert set(looped["sampling"]) == {"well"}
    assert looped["val_loss"].notna().all()
    assert nerve.load_runs("outputs/loop")["run_status"].tolist() == ["done"]
    assert nerve.load_metrics("outputs/resumed")["step"].tolist() == [0, 0]
    saved = torch.load("last.pt")
    assert saved["watch"]["n_steps"] == saved["optimizer"]["state"][0]["step"] == 20
    trained = nerve.load_metrics("outputs/trainer")
    assert trained["step"].tolist() == [0, 0, 2, 2, 4, 4]
    assert trained["train_loss"].notna().tolist() == [False, False, True, True, True, True]
    fitted = nerve.load_metrics("outputs/lightning", factors=["optimizer.lr"])
    assert fitted["step"].tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    assert set(fitted["optimizer.lr"]) == {1e-3}


RECIPES = {
    "nerve.measure(gpt2, batches)\n": ("import nerve", "nerve.measure("),
    '"outputs/loop"': ("import nerve", "nerve.watch(", "run.step(", "config = "),
    "Trainer(model": ("import nerve", "nerve.SpectralCallback(", "callbacks="),
}
"""Words of each recipe, and of those of its lines that are there for nerve."""


def test_a_recipe_stands_alone_and_takes_few_lines():
    """Formatted by ruff, it adds at most six lines to a loop of twenty; another test runs it."""
    for words, ours in RECIPES.items():
        text = example("python", words)
        for line in text.splitlines():
            assert len(line) <= 88
        formatted = subprocess.run(
            ["ruff", "format", "--isolated", "-"], input=text, capture_output=True, text=True
        )
        assert formatted.stdout == text
        lines = [line for line in text.splitlines() if line]
        assert len(lines) <= 20
        assert sum(any(word in line for word in ours) for line in lines) == len(ours) <= 6
        assert {"import nerve", "import torch"} <= set(lines)


def given_trained_models() -> dict[str, Any]:
    """What the page on trained models assumes, after its commands."""
    save(llama(), Path("models/tiny"))
    for step in (0, 10):
        save(llama(seed=step), Path(f"ckpt/step_{step}"))
    text = write_text(Path("texts"))
    calls = {"nerve-probe": probe.main, "nerve-report": report.main}
    (block,) = [each.text for each in examples("bash") if each.page == "docs/probing.md"]
    called = []
    for command, *arguments in (shlex.split(line, comments=True) for line in block.splitlines()):
        if command in calls:
            calls[command](arguments)
            called.append(command)
    assert called == 3 * ["nerve-probe"] + ["nerve-report"]
    return {"texts": [file.read_text()[:32] for file in sorted(text.parent.glob("*.txt"))]}


def check_trained_models(found: SimpleNamespace) -> None:
    assert found.last[["step", "layer"]].to_numpy().tolist() == [[0, 0], [0, 1], [10, 0], [10, 1]]
    assert found.last["probe.skip_first"].tolist() == [0, 0, 1, 1]
    assert set(found.last["model.kind"]) == {"llama"}
    assert Path("report/index.html").is_file()
    assert nerve.load_metrics("outputs/mine")["pr_pre"].tolist() == found.rows["pr_pre"].tolist()


RUN: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[SimpleNamespace], None]]] = {
    "README.md": (dict, check_readme),
    "docs/reports.md": (dict, check_comparison),
    "docs/own-model.md": (dict, check_own_model),
    "docs/probing.md": (given_trained_models, check_trained_models),
}
"""Pages to what their code takes as given, and what holds after it."""


def test_all_code_of_the_pages_is_run():
    """Here, or in storage/test_other_readers.py, which has fixtures for it."""
    pages = {block.page for language in ("python", "sql") for block in examples(language)}
    assert pages == RUN.keys() | {"docs/results.md"}
    assert [block.page for block in examples("sql")] == ["docs/results.md"]
    assert len([b for b in examples("python") if b.page == "docs/results.md"]) == 1


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")  # of Lightning
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # of the Trainer
@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs_as_it_stands(page, trained_runs, tmp_path, monkeypatch):
    """From top to bottom, where `outputs` has a sweep of eight runs; recipes without the code above
    them."""
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    Path("outputs", "multirun").symlink_to(trained_runs)
    given, check = RUN[page]
    names = given()
    for block in examples("python"):
        if block.page == page:
            own = {} if any(words in block.text for words in RECIPES) else names
            exec(block.text, own)
            names |= own
    check(SimpleNamespace(**names))
