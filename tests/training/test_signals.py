"""Signals that ask to stop: at once before training, at the end of a step in it."""

import os
import signal
import threading

import pytest

from nerve.training import signals
from nerve.training.signals import STOPPING, Interrupted, StopSignals


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", STOPPING)
def test_before_training_a_signal_ends_the_run_where_it_stands(signum):
    with pytest.raises(Interrupted, match=signal.Signals(signum).name) as stopped:  # noqa: SIM117
        with StopSignals():
            send(signum)
    assert stopped.value.code == 128 + signum


@pytest.mark.parametrize("signum", STOPPING)
def test_in_training_a_signal_waits_to_be_asked_for(signum):
    with StopSignals() as asked:
        asked.defer()
        assert not asked.received
        send(signum)
        assert asked.received
        with pytest.raises(Interrupted) as stopped:
            asked.stop()
        assert stopped.value.code == 128 + signum


def test_a_second_ctrl_c_ends_at_once(capfd):
    with StopSignals() as asked:
        asked.defer()
        send(signal.SIGINT)
        assert "SIGINT: stopping at the end of this step; once more" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR2])
def test_a_batch_system_may_signal_as_often_as_it_likes(first):
    """SLURM sends SIGTERM to each step of a job, and after the signal before the time limit."""
    with StopSignals() as asked:
        asked.defer()
        for signum in (first, first, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2):
            send(signum)
        with pytest.raises(Interrupted) as stopped:
            asked.stop()
        assert stopped.value.code == 128 + first


def test_a_process_that_got_no_signal_stops_with_the_others():
    with StopSignals() as asked, pytest.raises(Interrupted, match="SIGTERM"):
        asked.stop()


def test_what_handled_signals_before_does_so_again():
    before = [signal.getsignal(signum) for signum in STOPPING]
    with StopSignals() as asked:
        asked.defer()
        assert [signal.getsignal(signum) for signum in STOPPING] != before
    assert [signal.getsignal(signum) for signum in STOPPING] == before


def test_handlers_that_someone_installs_meanwhile_do_not_act():
    """Lightning puts its own over ours when it starts to fit."""
    acted = []
    with StopSignals() as asked:
        signal.signal(signal.SIGTERM, lambda *args: acted.append(args))
        asked.defer()
        send(signal.SIGTERM)
        assert asked.received
    assert not acted


def test_signals_are_handed_on_to_what_handled_them_before_once_all_is_saved():
    """submitit's handler of SIGUSR2 counts the timeout, requeues, and exits."""
    handled = []
    before = signal.signal(signal.SIGUSR2, lambda *args: handled.append(args))
    try:
        with StopSignals() as asked:
            asked.defer()
            for signum in (signal.SIGUSR2, signal.SIGINT):
                send(signum)
            assert handled == []
            asked.hand_on()
            assert handled == [(signal.SIGUSR2, None)]
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize(("job", "waits"), [("12", True), (None, False)])
def test_after_sigterm_a_job_of_slurm_waits_to_be_killed(monkeypatch, job, waits):
    slept = []
    monkeypatch.setattr(signals.time, "sleep", slept.append)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    else:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with StopSignals() as asked:
        asked.defer()
        asked.hand_on()
        assert slept == []
        send(signal.SIGTERM)
        asked.hand_on()
    assert bool(slept) is waits


def test_a_thread_that_is_not_the_main_one_runs_without():
    errors = []

    def work():
        try:
            with StopSignals() as asked:
                asked.defer()
                assert not asked.received
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_stays_so(signum):
    """`nohup`, and a shell that runs a command in the background."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with StopSignals() as asked:
            send(signum)
            asked.defer()
            send(signum)
            assert not asked.received
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, before)
