"""An eigenproblem that waits for a thread is copied to the host at most once, and never lost."""

import pytest
import torch

from nerve.measuring.eigenproblem import GroupEigenproblem
from nerve.recording.dispatch import Untaken


def problem(value: float) -> GroupEigenproblem:
    matrix = torch.full((4, 4), value, dtype=torch.float64)
    return GroupEigenproblem(0, "ffn", "pre", "all", "all", 9, 4, matrix)


def test_a_copy_made_ahead_is_solved_and_takes_no_device_memory():
    given, copy = problem(1.0), problem(2.0)
    untaken = Untaken(given)
    assert (untaken.n_bytes, untaken.is_copied) == (128, False)
    untaken.copy(lambda _: copy)
    assert (untaken.n_bytes, untaken.is_copied) == (0, True)
    assert untaken.take() is copy


def test_a_taken_eigenproblem_is_not_copied():
    untaken = Untaken(problem(1.0))
    untaken.take()
    untaken.copy(lambda _: pytest.fail("copied"))
    assert (untaken.n_bytes, untaken.is_copied) == (0, False)


def test_an_eigenproblem_that_cannot_be_copied_is_kept():
    def refuse(_):
        raise MemoryError

    given = problem(1.0)
    untaken = Untaken(given)
    with pytest.raises(MemoryError):
        untaken.copy(refuse)
    assert untaken.take() is given
