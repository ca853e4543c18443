"""Models drawn at random are measured right, or refused; `fuzz.py` draws more of them."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

PATH = Path(__file__).parent / "fuzz.py"
spec = importlib.util.spec_from_file_location("fuzz", PATH)
assert spec is not None
assert spec.loader is not None
fuzz = sys.modules["fuzz"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


def test_models_drawn_at_random_give_the_right_numbers_or_a_refusal():
    """At least half are compared; a wrong number raises with the case."""
    ends = Counter(fuzz.outcome(seed)[1] for seed in range(150))
    assert ends["compared"] >= 75
    assert len(ends) > 5
