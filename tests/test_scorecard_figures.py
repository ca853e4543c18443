"""The figures of the study are drawn only from its committed runs, without flagged runs."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from studied import RUNS, STUDY

Draw = Callable[[Path, Path], list[Path]]


@pytest.fixture(scope="module")
def draw(scorecard: SimpleNamespace) -> Draw:
    """The figures of a folder of runs, without their core checks."""

    def draw(runs: Path, folder: Path) -> list[Path]:
        return scorecard.figures.draw(scorecard.evidence.Evidence(runs), [], folder)

    return draw


@pytest.fixture(scope="module")
def drawn(
    scorecard: SimpleNamespace,
    evidence: Any,
    judged: Sequence[Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Path]:
    """All figures of the committed runs, with the paper's core checks."""
    own = judged[: len(scorecard.criteria.CHECKS)]
    return scorecard.figures.draw(evidence, own, tmp_path_factory.mktemp("drawn"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A modifiable folder of runs with one sweep."""
    shutil.copytree(RUNS / "position_gpu", tmp_path / "runs" / "position_gpu")
    return tmp_path / "runs"


def mark_failed(record: Path) -> None:
    record.write_text(json.dumps(json.loads(record.read_text()) | {"run_status": "failed"}))


def test_every_committed_figure_is_drawn_from_the_committed_runs(drawn):
    """The same names as in study/figures; each is an image with ink on less than half of its
    area."""
    assert {path.name for path in drawn} == {path.name for path in STUDY.glob("figures/*.png")}
    for path in drawn:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] > 1200, path.name
        assert 0.01 < (pixels < 200).mean() < 0.5, path.name


def test_one_sweep_alone_gives_its_figure_and_the_same_bytes(draw, drawn, runs, tmp_path):
    (alone,) = draw(runs, tmp_path / "alone")
    assert alone.name == "position.png"
    (again,) = [path for path in drawn if path.name == alone.name]
    assert alone.read_bytes() == again.read_bytes()


def test_a_failed_run_does_not_change_a_figure(draw, drawn, runs, tmp_path):
    """Marking a run as failed gives the same image as removing it, and another one than keeping
    it."""
    record = min(runs.glob("position_gpu/*/run.json"))
    mark_failed(record)
    (failed,) = draw(runs, tmp_path / "failed")
    shutil.rmtree(record.parent)
    (without_it,) = draw(runs, tmp_path / "without")
    (with_it,) = [path for path in drawn if path.name == failed.name]
    assert failed.read_bytes() == without_it.read_bytes()
    assert failed.read_bytes() != with_it.read_bytes()


def test_a_question_whose_runs_all_failed_has_no_figure(draw, runs, tmp_path):
    for record in runs.glob("position_gpu/*/run.json"):
        mark_failed(record)
    assert draw(runs, tmp_path / "none") == []


def test_the_overview_names_metrics_with_their_units(scorecard, evidence):
    figure = scorecard.figures.overview(evidence.sweep("activation_gpu"))
    labels = [panel.get_ylabel() for panel in figure.axes]
    assert labels[:3] == ["SE (nats)", "PR (dimensions)", labels[2]]
    assert labels[2].startswith("EEE (")
