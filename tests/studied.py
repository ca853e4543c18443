"""The study, loaded and judged once for all tests of its pages, its rule and its figures."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

STUDY = Path(__file__).parents[1] / "study"
RUNS = STUDY / "runs"
MODULES = ("claims", "criteria", "evidence", "figures", "judgement", "page", "verdicts")


@pytest.fixture(scope="session")
def scorecard() -> Iterator[SimpleNamespace]:
    """The modules of study/scorecard, imported by plain names as in `python study/scorecard`, and
    unloaded afterwards."""
    folder = STUDY / "scorecard"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        modules = {name: importlib.import_module(name) for name in MODULES}
    yield SimpleNamespace(**modules)
    for name, module in list(sys.modules.items()):
        if folder in Path(getattr(module, "__file__", None) or "").parents:
            del sys.modules[name]


@pytest.fixture(scope="session")
def evidence(scorecard: SimpleNamespace) -> Any:
    """The committed runs; each sweep is loaded once."""
    return scorecard.evidence.Evidence(RUNS)


@pytest.fixture(scope="session")
def judged(scorecard: SimpleNamespace, evidence: Any) -> list[Any]:
    """All checks on the committed runs: those of the paper, then our own."""
    return judgements(scorecard, evidence)


def judgements(scorecard: SimpleNamespace, evidence: Any) -> list[Any]:
    """The judged checks of the paper, and our own."""
    return [check.judge(evidence) for check in scorecard.criteria.CHECKS + scorecard.criteria.OURS]
