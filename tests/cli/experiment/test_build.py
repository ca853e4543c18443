"""The parts of a run that are built from a plan."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from support import composed

from nerve.cli.experiment.build import build_data, counts, warn_of_narrow_inputs
from nerve.cli.experiment.plan import Plan


@pytest.fixture
def built(monkeypatch) -> list:
    """The data that the command would train on."""
    built: list = []

    def run_experiment(config, _) -> float:
        assert Path.cwd().name == "it"
        built.append(build_data(Plan.of(config)))
        return 1.0

    module = ModuleType("nerve.cli.experiment.run")
    module.run_experiment = run_experiment
    monkeypatch.setitem(sys.modules, "nerve.cli.experiment.run", module)
    return built


@pytest.mark.parametrize(
    "paths",
    [
        ["data=text_files", "data.corpus.paths=some/a.py"],
        ["data=text_files", "data.corpus.paths=['some/*.py']", "data.cache_dir=cache"],
        ["data.corpus.roots=some"],
        ["data.corpus.roots=[some]", "data.cache_dir=./cache"],
    ],
)
def test_relative_paths_start_where_the_command_was_given_even_with_chdir(
    run, tmp_path, built, paths
):
    (tmp_path / "some").mkdir()
    for name in "ab":
        (tmp_path / "some" / f"{name}.py").write_text(f"{name} = 1\n" * 5000)
    small = [
        "model.seq_len=8",
        "monitor.n_tokens=8",
        "data.val_fraction=0.3",
        "data.vocab_size=257",
    ]
    status, _, err = run("hydra.job.chdir=true", "hydra.run.dir=it", *small, *paths)
    assert (status, err) == (0, "")
    [data] = built
    assert data.describe()["n_documents"] >= 2
    folders = [path.name for path in tmp_path.iterdir()]
    assert sorted(folders) == (
        ["cache", "it", "some"] if "cache" in " ".join(paths) else ["it", "some"]
    )
    assert not list((tmp_path / "it").iterdir())


def test_counts_precede_their_names_and_other_values_follow_theirs():
    described = {
        "corpus": "digits",
        "n_train_images": 1433,
        "n_train_epochs": 28.1,
        "image_size": 8,
    }
    assert counts(described) == (
        "corpus digits, 1,433 train images, 28.1 train epochs, image size 8"
    )


@pytest.mark.parametrize(("size", "n_named"), [(4, 1), (6, 0)])
def test_token_mixing_of_few_patches_is_named(caplog, size, n_named):
    """Patches of 2 × 2 pixels: 4 are too few, 9 are not."""
    plan = Plan.of(composed("model=mixer_tiny", "logger=none"))
    warn_of_narrow_inputs(plan, {"image_size": size, "n_channels": 1, "n_classes": 10})
    expected = "token_mixing: its inputs have 4 features, so at most 4 of the 128 eigenvalues"
    assert caplog.text.count(expected) == len(caplog.records) == n_named
