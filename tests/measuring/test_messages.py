"""Objects that the processes of a run send each other, and whom they do not wait for."""

import json
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import together

from nerve.errors import NotGatheredError, StoreError
from nerve.measuring import messages
from nerve.measuring.collectives import highest
from nerve.measuring.departures import Exit, knowing_others, leave
from nerve.measuring.messages import Mailbox, gathered, own_part
from nerve.measuring.processes import rank

CPU = torch.device("cpu")


def tell(index: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=index, world_size=2)
    parts = gathered({"mine": index})
    heard = [rank(), parts, own_part(parts), highest(5 - index, CPU)]
    for number in range(3):  # each exchange has its own, and what was read is let go
        assert gathered((number, index)) == [(number, 0), (number, 1)]
    box, other = Mailbox(), Mailbox()
    if index == 1:
        box.send("late")
        box.send(None)
        other.send(7)
        gathered(None)
    else:
        gathered(None)
        assert [other.take(wait=False), box.take(wait=True), box.take(wait=False)] == [
            *([7], ["late"], [None])
        ]
        assert box.take(wait=False) is None  # there is no more
    gathered(None)
    Path(folder, f"{index}.json").write_text(json.dumps(heard))
    dist.destroy_process_group()


def test_a_single_process_gathers_its_own_value():
    assert (rank(), gathered("x"), own_part(["x"]), highest(3, CPU)) == (0, ["x"], "x", 3)


@pytest.mark.parametrize("n_processes", [0, 2])
def test_values_gathered_by_another_number_of_processes_raise(n_processes):
    told = f"its checkpoint is of {n_processes} processes, now there are 1. Start it with"
    with pytest.raises(StoreError, match=told):
        own_part(["x"] * n_processes)


def test_two_processes_gather_in_order_of_rank(tmp_path):
    together(tell, 2, tmp_path)
    for index in range(2):
        heard = json.loads((tmp_path / f"{index}.json").read_text())
        assert heard == [index, [{"mine": 0}, {"mine": 1}], {"mine": index}, 5]


@pytest.mark.parametrize("who", [0, 1])
def test_waiting_for_a_process_that_has_left_raises_with_its_reason(two, who):
    """In a collective exchange."""

    def process(index: int) -> object:
        assert gathered(index) == [0, 1]
        if index == who:
            return leave(ValueError("no more"))
        return gathered(index)

    error = two(process)[1 - who]
    assert isinstance(error, NotGatheredError)
    assert f"process {who} has stopped: ValueError: no more" in str(error)


def test_waiting_for_mail_of_a_process_that_has_left_raises_with_its_reason(two):
    """After receiving what was sent before."""

    def process(index: int) -> object:
        box = Mailbox()
        if index == 1:
            box.send("first")
            return leave(RuntimeError("gone"))
        assert box.take(wait=True) == ["first"]
        return box.take(wait=True)

    error = two(process)[0]
    assert isinstance(error, NotGatheredError)
    assert "process 1 has stopped: RuntimeError: gone" in str(error)


def test_a_process_that_has_exited_is_not_waited_for(two, monkeypatch):
    """Neither for its value nor for half a minute, in case its error was caught."""
    monkeypatch.setattr(messages, "BELIEVED_AFTER_S", 60.0)
    exits: dict[int, Exit] = {}
    began = time.monotonic()

    def process(index: int) -> object:
        if index == 1:
            time.sleep(0.05)
            return exits.update({1: Exit("was killed by SIGKILL")})
        with knowing_others(exits):
            return gathered(index)

    error = two(process)[0]
    assert str(error) == (
        "The processes of a run must all continue together; process 1 was killed by SIGKILL"
    )
    assert time.monotonic() - began < 10


def test_what_a_process_sent_before_it_exited_is_received(two):
    has_sent = threading.Event()

    def process(index: int) -> object:
        box = Mailbox()
        if index == 1:
            box.send("last")
            return has_sent.set()
        assert has_sent.wait(10)
        with knowing_others({1: Exit("ended with status 0")}):
            return box.take(wait=True)

    assert two(process)[0] == ["last"]


def test_a_process_that_has_left_may_return(two, monkeypatch):
    """After an error that all processes have caught. Then it may take longer than one that has left
    is waited for."""
    monkeypatch.setattr(messages, "BELIEVED_AFTER_S", 1.0)

    def process(index: int) -> object:
        leave(ValueError("caught"))
        time.sleep(0.02 * index)
        first = gathered(index)
        time.sleep(1.2 * (1 - index))
        return first, gathered(-index)

    assert two(process) == [([0, 1], [0, -1])] * 2


def test_a_process_that_returns_while_its_reason_is_read_is_waited_for(two, monkeypatch):
    """It has taken back the reason meanwhile."""
    monkeypatch.setattr(messages, "has_left", lambda other: True)

    def process(index: int) -> object:
        time.sleep(0.2 * index)
        return gathered(index)

    assert two(process) == [[0, 1], [0, 1]]


def test_the_first_process_does_not_leave_before_all_have_read(two, monkeypatch):
    has_read, get = threading.Event(), dist.PrefixStore.get

    def slow(store: dist.Store, key: str) -> bytes:
        if rank() == 1:
            time.sleep(0.1)
            if key.endswith("/1"):  # the last one that it reads
                has_read.set()
        return get(store, key)

    monkeypatch.setattr(dist.PrefixStore, "get", slow)
    assert two(lambda index: (gathered(index), index or has_read.is_set())) == [
        ([0, 1], True),
        ([0, 1], 1),
    ]


def test_a_missing_process_is_waited_for_until_the_timeout_of_the_group(two):
    two.store.set_timeout(timedelta(seconds=0.2))
    error = two(lambda index: gathered(index) if index == 0 else None)[0]
    assert isinstance(error, NotGatheredError)
    assert "1 did not come within 0:00:00.2" in str(error)


@pytest.mark.parametrize("do", [gathered, lambda value: Mailbox().send(value)])
def test_the_end_of_the_first_process_is_reported_by_the_others(two, monkeypatch, do):
    """It hosts the store; torch's own message ends in a C++ trace."""

    def gone(*_: object) -> None:
        raise dist.DistNetworkError("Connection reset by peer\nException raised from recvBytes")

    monkeypatch.setattr(dist.PrefixStore, "set", gone)
    with pytest.raises(
        NotGatheredError, match=r"without an error message: Connection reset by peer$"
    ):
        do(1)


def test_a_waiting_process_receives_signals(two):
    """During a wait of its own, torch would let none through."""

    def heard(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, heard)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            gathered(0)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
