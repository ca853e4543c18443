"""Processes started by tests end within a bound, and print their stacks if they do not."""

import ctypes
import socket
import threading
import time
from pathlib import Path

import processes
import pytest
import torch.distributed as dist
from processes import ended, held_port, start, together


def wait_for_ever(rank: int, folder: str) -> None:
    """The second process waits forever; the first fails once it does."""
    there = Path(folder, "there")
    if rank == 0:
        wait_for(there)
        raise ValueError("the first cannot go on")
    there.touch()
    threading.Event().wait()


def hold_the_interpreter(folder: str) -> None:
    """Neither another thread nor a signal handler can run."""
    Path(folder, "there").touch()
    while True:
        ctypes.PyDLL(None).sleep(1000)


def wait_for(file: Path) -> None:
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_who_waits_for_one_that_failed_is_ended_and_both_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "FOLLOWS_WITHIN_S", 0.1)
    with pytest.raises(TimeoutError) as raised:
        together(wait_for_ever, 2, tmp_path)
    told = str(raised.value)
    assert told.startswith("1 of 2 did not end")
    assert "ValueError: the first cannot go on" in told
    assert "in wait_for_ever" in told.partition("most recent call first")[2]


def test_who_hears_no_signal_tells_where_it_stands_all_the_same(tmp_path):
    process = start(hold_the_interpreter, str(tmp_path), cwd=tmp_path, log=tmp_path / "log")
    wait_for(tmp_path / "there")
    with pytest.raises(TimeoutError, match="in hold_the_interpreter"):
        ended(process, 0.1)
    assert process.exitcode is not None


def test_a_port_that_is_held_is_given_to_nobody_and_serves_whoever_is_told():
    with held_port() as port:
        others = [socket.socket() for _ in range(300)]
        for other in others:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", 0))
        assert int(port) not in {other.getsockname()[1] for other in others}
        for other in others:
            other.close()
        store = dist.TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)
        store.set("here", "yes")
        assert store.get("here") == b"yes"
