"""Which processes of a run have left, and why."""

import time

import pytest
import torch.distributed as dist

from nerve.errors import NotGatheredError, StoppedError
from nerve.measuring.departures import Exit, knowing_others, leave, reason_of_others

CLOSED = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:5] Connection closed")


@pytest.mark.parametrize("error", [CLOSED, dist.DistBackendError("NCCL error: remote")])
@pytest.mark.parametrize("has_left", [True, False])
def test_a_collective_that_another_process_has_left_raises_with_its_reason(two, has_left, error):
    """Or without one, if it was killed. A reason of this process itself is not one."""

    def process(index: int) -> object:
        if index == 1:
            return leave(ValueError("no more")) if has_left else None
        time.sleep(0.02)
        leave(error)
        with knowing_others({}):
            raise error

    raised = two(process)[0]
    assert isinstance(raised, NotGatheredError)
    assert raised.__cause__ is error
    reason = (
        "process 1 has stopped: ValueError: no more" if has_left else f"torch reports: {error}."
    )
    assert reason in str(raised)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), StoppedError("told so")])
def test_a_process_that_was_asked_to_stop_says_so(two, error):
    two.as_rank(1, lambda: leave(error))
    assert isinstance(reason_of_others(), StoppedError)


def test_a_process_that_exited_because_it_was_asked_to_stop_was_stopped(two):
    with knowing_others({1: Exit("was killed by SIGINT", is_stop=True)}):
        assert isinstance(reason_of_others(), StoppedError)


def test_after_the_block_no_exits_are_known(two):
    with knowing_others({1: Exit("was killed by SIGKILL")}):
        assert "was killed" in str(reason_of_others())
    assert reason_of_others() is None


@pytest.mark.parametrize("late_s", [0.0, 0.1])
def test_an_exit_that_is_noticed_late_explains_a_closed_connection(two, late_s):
    exits: dict[int, Exit] = {}

    def process(index: int) -> object:
        if index == 1:
            time.sleep(late_s)
            return exits.update({1: Exit("was killed by SIGKILL")})
        with knowing_others(exits):
            raise CLOSED

    assert "process 1 was killed by SIGKILL" in str(two(process)[0])


@pytest.mark.parametrize(
    ("exits", "reason"),
    [
        ({}, "process 1 has stopped: RuntimeError"),
        ({3: Exit("was killed by SIGKILL")}, "process 3 was"),
    ],
)
def test_one_that_left_because_of_another_one_is_the_last_to_explain_it(
    two, monkeypatch, exits, reason
):
    monkeypatch.setattr(dist, "get_world_size", lambda: 5)
    two.as_rank(1, lambda: leave(CLOSED))
    two.as_rank(2, lambda: leave(NotGatheredError("of process 1")))
    with knowing_others(exits):
        assert reason in str(reason_of_others())
        two.as_rank(4, lambda: leave(ValueError("the first")))
        assert "process 4 has stopped: ValueError: the first" in str(reason_of_others())


def test_other_errors_are_raised_as_they_are_even_if_another_process_has_left(two):
    own = RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def process(index: int) -> object:
        leave(own)
        with knowing_others({}):
            raise own

    assert two(process) == [own, own]
