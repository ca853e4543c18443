"""Randomly drawn models are measured correctly, or raise; `fuzz.py` draws more of them."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

PATH = Path(__file__).parent / "fuzz.py"
spec = importlib.util.spec_from_file_location("fuzz", PATH)
assert spec is not None
assert spec.loader is not None
fuzz = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


def test_random_models_are_measured_correctly_or_raise():
    """At least half are compared; a wrong number raises with the case."""
    ends = Counter(fuzz.outcome(seed)[1] for seed in range(100))
    assert ends["compared"] >= 50
    assert len(ends) > 5


FAILS = {
    "post follows from pre": 28,
    "pre is no factor": 10,
    "pre has a weight": 0,
    "masks are 0 and 1": 2,
    "W x + b is what the layer gave": 34,
    "the weight is that of the first batch": 9,
    "the number of runs": 1,
    "the axis is as wide as declared": 33,
    "post of the same samples": 41,
    "the order of tokens": 5,
    "the tokens of an expert": 19,
    "pre unchanged": 279,
}
"""By check the number of a case that fails without it."""


def test_every_check_has_a_case():
    assert FAILS.keys() == fuzz.without().keys()


@pytest.mark.parametrize("check", FAILS)
def test_a_case_fails_without_its_check(check):
    """So the fuzz notices if a check is removed."""
    assert not fuzz.fails(FAILS[check], None)
    assert fuzz.fails(FAILS[check], check)
