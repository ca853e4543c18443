"""Eigenproblems are solved in order, errors name their place, and nothing pending is lost."""

import gc
import os
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
import torch
from operations import count

from nerve.errors import MeasurementError
from nerve.measuring.eigenproblem import FFNEigenproblem, FFNSpectra, GroupEigenproblem
from nerve.recording.dispatch import Dispatch
from nerve.recording.placement import Placement
from nerve.recording.solver import MOST_PENDING, Solver

CPU = torch.device("cpu")
SHARES = torch.full((2, 4), 0.1, dtype=torch.float64)


def make_eigenproblem(layer: int, scale: float = 1.0) -> FFNEigenproblem:
    """An eigenproblem whose covariances have the eigenvalues 1 to 4 times `scale`."""
    scatter = 9 * scale * torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64))
    return FFNEigenproblem(
        layer, "ffn", 10, 4, 4, "float64", before=scatter, post=scatter, shares=SHARES
    )


class Held(FFNEigenproblem):
    """An eigenproblem that is not solved before its gate opens."""

    gate: threading.Event

    def solve(self) -> FFNSpectra:
        assert self.gate.wait(100)
        return super().solve()


def hold(problem: FFNEigenproblem, gate: threading.Event) -> FFNEigenproblem:
    held = Held(**vars(problem))
    object.__setattr__(held, "gate", gate)
    return held


@pytest.fixture(params=[0, 3])
def solver(request):
    solver = Solver(CPU, n_workers=request.param)
    yield solver
    solver.close()


def test_every_measurement_is_returned_once_in_order(solver):
    solved = []
    for step in range(6):
        problems = [make_eigenproblem(layer, scale=step + 1) for layer in range(4)]
        solved += solver.submit({"step": step}, problems)
    solved += solver.drain()
    assert [item.labels["step"] for item in solved] == list(range(6))
    for item in solved:
        assert [spectra.layer for spectra in item.spectra] == [0, 1, 2, 3]
        for spectra in item.spectra:
            expected = torch.tensor([4.0, 3, 2, 1]) * (item.labels["step"] + 1)
            torch.testing.assert_close(spectra.post, expected.double())
    assert not list(solver.drain())


def test_rows_cost_the_writing_thread_no_operations(solver):
    """Including the rows of groups, and pre and post of all samples next to them."""
    group = GroupEigenproblem(0, "ffn", "pre", "halves", "a", 10, 4, make_eigenproblem(0).post)
    solved = [*solver.submit({"step": 0}, [make_eigenproblem(0), group]), *solver.drain()]
    assert count(lambda: [(each.rows, each.group_rows) for each in solved]) == 0
    places = [(row["site"], row["group"], row["variance"]) for row in solved[0].group_rows]
    assert places == [("pre", "all", 10.0), ("post", "all", 10.0), ("pre", "a", 10.0)]


def test_without_workers_a_measurement_is_solved_at_once():
    solver = Solver(CPU)
    assert solver.n_workers == 0
    (solved,) = solver.submit({"step": 0}, [make_eigenproblem(0)])
    assert solved.spectra[0].row()["status"] == "ok"


def test_measurements_stay_in_order_and_too_many_wait_for_the_oldest():
    gate, solver = threading.Event(), Solver(CPU, n_workers=2)
    assert not list(solver.submit({"step": 0}, [hold(make_eigenproblem(0), gate)]))
    for step in range(1, MOST_PENDING):
        assert not list(solver.submit({"step": step}, [make_eigenproblem(0)]))
    threading.Timer(0.2, gate.set).start()
    solved = list(solver.submit({"step": MOST_PENDING}, [make_eigenproblem(0)]))  # back-pressure
    assert gate.is_set()
    solved += solver.drain()
    assert [item.labels["step"] for item in solved] == list(range(MOST_PENDING + 1))
    solver.close()


def interrupted(call) -> None:
    """Ctrl-C while `call` waits; again if it still does, as a signal that comes just before a wait
    does not end it."""
    over = threading.Event()

    def press() -> None:
        time.sleep(0.05)
        while not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            over.wait(2)

    threading.Thread(target=press, daemon=True).start()
    try:
        call()
    finally:
        over.set()


def test_ctrl_c_during_a_wait_loses_nothing():
    """The awaited measurement is returned by the next call, before the others."""
    gate, solver = threading.Event(), Solver(CPU, n_workers=1)
    solver.submit({"step": 0}, [hold(make_eigenproblem(0), gate)])
    solver.submit({"step": 1}, [make_eigenproblem(0)])
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: list(solver.drain()))
    gate.set()
    assert [item.labels["step"] for item in solver.drain()] == [0, 1]
    solver.close()


def test_ctrl_c_during_close_has_already_dropped_pending_work():
    """Otherwise the interpreter would wait for all of it when it exits."""
    gate, solver = threading.Event(), Solver(CPU, n_workers=1)
    solver.submit({"step": 0}, [hold(make_eigenproblem(layer), gate) for layer in range(3)])
    futures = [each.future for each in solver._pending[0].waiting]
    until = time.monotonic() + 100
    while not futures[0].running() and time.monotonic() < until:
        time.sleep(0.001)
    with pytest.raises(KeyboardInterrupt):
        interrupted(solver.close)
    assert [future.cancelled() for future in futures] == [False, True, True]
    gate.set()
    solver.close()


def test_an_unsolvable_eigenproblem_raises_with_its_layer_and_step(solver):
    bad = replace(make_eigenproblem(3), post=-torch.eye(4, dtype=torch.float64))
    with pytest.raises(MeasurementError, match="ffn in layer 3 at step 7 could not be solved"):
        list(solver.submit({"step": 7}, [make_eigenproblem(2), bad])) + list(solver.drain())


@pytest.mark.parametrize("raised", [SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_anything_that_a_thread_raises_is_an_error_of_its_eigenproblem(raised):
    """It does not end the calling thread, and later measurements are solved."""

    class Ends(FFNEigenproblem):
        def solve(self) -> FFNSpectra:
            raise raised

    solver = Solver(CPU, n_workers=1)
    solver.submit({"step": 0}, [Ends(**vars(make_eigenproblem(5)))])
    named = str(raised) or type(raised).__name__
    with pytest.raises(MeasurementError, match=f"layer 5 at step 0 could not be solved: {named}"):
        list(solver.drain())
    solver.submit({"step": 1}, [make_eigenproblem(0)])
    assert [item.labels["step"] for item in solver.drain()] == [1]
    solver.close()


def test_a_submitted_measurement_is_solved_even_if_the_result_is_ignored(solver):
    """`submit` acts when it is called, even if nobody iterates over what it returns."""
    solver.submit({"step": 0}, [make_eigenproblem(0)])
    solver.submit({"step": 1}, [make_eigenproblem(0)])
    assert [item.labels["step"] for item in solver.drain()] == [0, 1]


@pytest.fixture
def gpu_like():
    """A solver on the CPU with the two places of a GPU."""
    solver = Solver(CPU, n_workers=2)
    solver._dispatch._of_gpu = ThreadPoolExecutor(1)
    yield solver
    solver.close()


def test_both_places_return_the_same_spectra_in_order(gpu_like, monkeypatch):
    monkeypatch.setattr(
        Placement, "choose", lambda self, works: ["host", "device"] * (len(works) // 2)
    )
    gpu_like.submit({"step": 0}, [make_eigenproblem(layer, scale=2) for layer in range(4)])
    (solved,) = gpu_like.drain()
    assert [spectra.layer for spectra in solved.spectra] == [0, 1, 2, 3]
    for spectra in solved.spectra:
        torch.testing.assert_close(spectra.post, torch.tensor([8.0, 6, 4, 2]).double())


def test_the_places_are_logged_when_they_change(gpu_like, monkeypatch, caplog):
    places = iter([["host"] * 2, ["host"] * 2, ["host", "device"]])
    monkeypatch.setattr(Placement, "choose", lambda self, works: next(places))
    with caplog.at_level("INFO"):
        for step in range(3):
            gpu_like.submit({"step": step}, [make_eigenproblem(layer) for layer in range(2)])
    assert [record.args for record in caplog.records] == [
        (0, 2, 2, 0, CPU),
        (2, 1, 2, 1, CPU),
    ]


def test_nothing_is_logged_if_spectra_are_solved_at_once(caplog):
    with caplog.at_level("INFO"):
        Dispatch(torch.device("cpu"), 0, 0).start([make_eigenproblem(0)], 0)
    assert caplog.records == []


def test_a_taken_eigenproblem_frees_device_memory(gpu_like):
    """Once a thread has taken it."""
    problem = make_eigenproblem(0)
    tensor = weakref.ref(problem.post)
    gpu_like.submit({"step": 0}, [problem])
    del problem
    wait([each.future for each in gpu_like._pending[0][1]])
    gc.collect()
    assert tensor() is None
