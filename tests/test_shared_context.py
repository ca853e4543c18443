"""A setting of the whole process stays changed as long as any thread needs it, and no longer."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import pytest
import torch
from torch import nn

from nerve.measuring.forward import evaluating
from nerve.recording.workers import _default_restored
from nerve.shared_context import SharedContext
from nerve.spectra.product import full_precision

T = TypeVar("T")


def overlap(context: Callable[[], AbstractContextManager[None]], read: Callable[[], T]) -> T:
    """What the second thread reads inside the context, after the first has left it."""
    found: list[T] = []
    is_second_inside, has_first_left = threading.Event(), threading.Event()

    def second() -> None:
        with context():
            is_second_inside.set()
            assert has_first_left.wait(100)
            found.append(read())

    thread = threading.Thread(target=second)
    with context():
        thread.start()
        assert is_second_inside.wait(100)
    has_first_left.set()
    thread.join()
    return found[0]


@pytest.fixture
def compiler():
    """The compiler as it is while nerve measures a compiled model."""
    return pytest.importorskip("torch._dynamo.eval_frame")


def test_threads_that_overlap_share_one_change():
    calls: list[str] = []

    @SharedContext
    @contextmanager
    def shared():
        calls.append("changed")
        yield
        calls.append("restored")

    assert overlap(shared, lambda: list(calls)) == ["changed"]
    assert calls == ["changed", "restored"]
    with shared(), shared():
        assert calls == ["changed", "restored", "changed"]
    assert calls == ["changed", "restored"] * 2


def test_a_change_that_fails_is_tried_again_by_the_next_thread():
    outcomes = iter([ZeroDivisionError(), None])

    @SharedContext
    @contextmanager
    def shared():
        if (error := next(outcomes)) is not None:
            raise error
        yield

    with pytest.raises(ZeroDivisionError), shared():
        pass
    with shared():
        assert next(outcomes, "all used") == "all used"


def test_an_error_inside_restores_the_setting():
    calls: list[str] = []

    @SharedContext
    @contextmanager
    def shared():
        yield
        calls.append("restored")

    with pytest.raises(ZeroDivisionError), shared():
        _ = 1 / 0
    assert calls == ["restored"]


def test_the_product_of_one_thread_keeps_its_digits_when_another_one_ends():
    """And the setting of the user returns once both have ended."""
    backend = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("high")
    try:
        assert overlap(full_precision, lambda: backend.fp32_precision) == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
        backend.fp32_precision = "none"


def test_a_measurement_stays_eager_and_dense_when_that_of_another_thread_ends(compiler):
    """Compiled code would bypass the probe; and would stay off for the rest of the process."""

    def measuring() -> AbstractContextManager[None]:
        return evaluating(nn.Linear(2, 2))

    def state() -> tuple[str, bool]:
        return compiler._stance.stance, torch.backends.mha.get_fastpath_enabled()

    before = state()
    assert overlap(measuring, state) == ("force_eager", False)
    assert state() == before


def test_pools_that_start_at_the_same_time_restore_the_default_number_of_threads():
    """The default of threads that start later, which each thread of a pool sets to 1."""

    @contextmanager
    def starting():
        with _default_restored():
            in_thread(lambda: torch.set_num_threads(1))
            yield

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        overlap(starting, lambda: None)
        assert in_thread(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


def in_thread(call: Callable[[], T]) -> T:
    """What `call` returns in a new thread."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]
