"""Losses that are not finite are found at their step, and looked for without work in each step."""

import pytest
import torch
from operations import count

from nerve.errors import DivergedError
from nerve.training.divergence import NEVER, Divergence


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("looks", [{2}, {2, 9}, {9}, {3, 4}])
def test_the_first_bad_step_is_named_whenever_it_is_looked_for(value, looks):
    divergence = Divergence()
    for step in range(10):
        divergence.note(step, torch.tensor(value if step in (3, 7) else 1.0))
        if step in looks:
            assert divergence.first() == (NEVER if step < 3 else 3)
    assert divergence.first() == 3


def test_a_loss_of_a_step_to_come_raises_nothing_yet():
    """Another process has seen it, say."""
    divergence = Divergence()
    divergence.note(1, torch.tensor(0.5))
    divergence.note_first(4)
    divergence.raise_at(3)
    with pytest.raises(DivergedError, match=r"at step 4\."):
        divergence.raise_at(4)


def test_to_note_a_loss_launches_nothing_and_to_look_little():
    divergence, loss = Divergence(), torch.tensor(1.0)
    assert count(lambda: [divergence.note(step, loss) for step in range(50)]) == 0
    assert 0 < count(divergence.first) <= 5
    assert count(divergence.first) == 0
