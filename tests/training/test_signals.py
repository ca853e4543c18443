"""Signals that ask to stop: obeyed immediately before training, at the end of a step during it."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nerve.errors import NotGatheredError, StoppedError
from nerve.training import signals
from nerve.training.signals import STOP_SIGNALS, Interrupted, StopSignals


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_before_training_a_signal_ends_the_run_where_it_stands(signum):
    name = signal.Signals(signum).name
    with pytest.raises(Interrupted, match=name) as stopped, StopSignals():
        send(signum)
    assert stopped.value.code == 128 + signum


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_in_training_a_signal_waits_to_be_asked_for(signum):
    with StopSignals() as asked:
        asked.defer()
        assert not asked.received
        send(signum)
        assert asked.received
        with pytest.raises(Interrupted) as stopped:
            asked.stop()
        assert stopped.value.code == 128 + signum


def test_a_second_ctrl_c_ends_at_once_and_a_third_changes_nothing(capfd):
    """What the second one ends is being saved."""
    with StopSignals() as asked:
        asked.defer()
        send(signal.SIGINT)
        assert (
            "SIGINT: stopping at the end of this step (press Ctrl-C again" in capfd.readouterr().err
        )
        with pytest.raises(Interrupted, match="stopped by SIGINT") as stopped:
            send(signal.SIGINT)
        assert (stopped.value.code, stopped.value.at_once) == (130, True)
        send(signal.SIGINT)
        send(signal.SIGTERM)


@pytest.mark.parametrize("is_deferred", [False, True])
def test_an_error_in_what_a_signal_has_interrupted_is_part_of_that(is_deferred):
    """torch.save, in the middle of a file: `unexpected pos 21440 vs 21334`."""

    def save() -> None:
        try:
            send(signal.SIGINT)
            send(signal.SIGINT)
        finally:
            raise RuntimeError("unexpected pos")

    with StopSignals() as asked:
        if is_deferred:
            asked.defer()
        with pytest.raises(Interrupted, match="stopped by SIGINT") as raised, asked.of_all():
            save()
    assert raised.value.at_once is is_deferred
    assert str(raised.value.__cause__) == "unexpected pos"


def test_signals_that_are_held_are_only_noted():
    with StopSignals() as asked:
        asked.hold()
        for signum in STOP_SIGNALS:
            send(signum)
            send(signum)
        assert asked.received


CLOSED = NotGatheredError("process 1 was killed by SIGKILL")


@pytest.mark.parametrize(
    ("received", "error", "ends_with", "code"),
    [
        (False, CLOSED, CLOSED, None),
        (True, CLOSED, "stopped by SIGTERM", 143),
        (True, StoppedError("process 1 has stopped"), "stopped by SIGTERM", 143),
        (False, StoppedError("process 1 has stopped"), "process 1 has stopped", 75),
        (True, ValueError("own"), "own", None),
    ],
)
def test_a_run_is_interrupted_as_a_whole(received, error, ends_with, code):
    with StopSignals() as asked:
        asked.defer()
        if received:
            send(signal.SIGTERM)
        with pytest.raises((Interrupted, type(error))) as raised, asked.of_all():
            raise error
    assert (str(raised.value), getattr(raised.value, "code", None)) == (str(ends_with), code)
    assert raised.value is error or raised.value.__cause__ is error


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR2])
def test_a_batch_system_may_signal_as_often_as_it_likes(first):
    """SLURM sends SIGTERM to each step of a job, also after the signal before the time limit."""
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
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    with StopSignals() as asked:
        asked.defer()
        assert [signal.getsignal(signum) for signum in STOP_SIGNALS] != before
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before


def test_handlers_that_someone_installs_meanwhile_do_not_act():
    """Lightning installs its own handlers when a fit starts."""
    acted = []
    with StopSignals() as asked:
        signal.signal(signal.SIGTERM, lambda *args: acted.append(args))
        asked.defer()
        send(signal.SIGTERM)
        assert asked.received
    assert not acted


def test_signals_are_handed_on_to_what_handled_them_before_once_all_is_saved():
    """submitit's handler of SIGUSR2 counts the timeout, requeues the job, and exits."""
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


@pytest.fixture
def slurm(monkeypatch) -> SimpleNamespace:
    """A SLURM job: `says` has the outputs of successive scontrol calls, and `slept` the time that
    the process waited."""
    cluster = SimpleNamespace(says=[], slept=[], asked=[])

    def run(command, **values):
        cluster.asked.append((command, values["timeout"]))
        said = cluster.says.pop(0) if len(cluster.says) > 1 else cluster.says[0]
        if isinstance(said, Exception):
            raise said
        return subprocess.CompletedProcess(command, 0, stdout=said, stderr="")

    clock = SimpleNamespace(sleep=cluster.slept.append, monotonic=lambda: sum(cluster.slept))
    monkeypatch.setattr(signals, "time", clock)
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    return cluster


def hand_on(signum: int) -> None:
    with StopSignals() as asked:
        asked.defer()
        send(signum)
        asked.hand_on()


@pytest.mark.parametrize(
    "said",
    [
        "JobId=12 JobState=PREEMPTED Reason=None PreemptTime=None",
        "JobId=12 JobState=RUNNING Reason=None PreemptTime=2026-11-26T10:00:00",
        "JobId=12 JobState=REQUEUED Reason=None",
        "JobId=12 JobState=CANCELLED Reason=None",
        "JobId=12 JobState=COMPLETING Reason=None",
    ],
)
def test_after_sigterm_a_job_that_slurm_ends_waits_to_be_killed(slurm, said):
    slurm.says = [said]
    hand_on(signal.SIGTERM)
    assert 30 <= sum(slurm.slept) <= 50  # the longest that it waits: here nobody kills it
    command, _ = slurm.asked[0]
    assert command == ("scontrol", "show", "job", "12")
    assert all(timeout for _, timeout in slurm.asked)


PREEMPTED = "JobId=12 JobState=RUNNING QOS=low Partition=gpu PreemptTime=2026-11-26T10:00:00"


@pytest.mark.parametrize(
    ("job", "partition", "qos", "expected"),
    [
        ("JobId=12 JobState=CANCELLED Partition=gpu QOS=low", 300, "00:05:00", 90),
        (PREEMPTED, 0, "00:00:00", 90),
        (PREEMPTED, 300, "", 390),
        (PREEMPTED, 0, "00:02:00", 210),
        (PREEMPTED, 60, "01:00:00", 3690),
    ],
)
def test_it_waits_as_long_as_the_cluster_lets_it(slurm, monkeypatch, job, partition, qos, expected):
    """KillWait, after the GraceTime of a preempted job."""
    says = {
        ("scontrol", "job"): job,
        ("scontrol", "config"): "KillOnBadExit = 0\nKillWait                = 90 sec\n",
        ("scontrol", "partition"): f"PartitionName=gpu GraceTime={partition} Hidden=NO",
        ("sacctmgr", "show"): qos,
    }

    def run(command, **values):
        said = says[command[0], command[2]]
        return subprocess.CompletedProcess(command, 0, stdout=said, stderr="")

    monkeypatch.setattr("subprocess.run", run)
    hand_on(signal.SIGTERM)
    assert expected <= sum(slurm.slept) <= expected + 20


def test_what_handled_a_signal_before_has_it_also_where_no_run_had_begun():
    """For a job whose time runs out while its trial is still starting."""
    handled = []
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: handled.append(signum))
    try:
        with pytest.raises(Interrupted), StopSignals():
            send(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert handled == [signal.SIGUSR2]


def handed_to(handler: Callable[[int, Any], object]) -> None:
    """A run whose time is up, in a process that is notified through `handler`."""
    before = signal.signal(signal.SIGUSR2, handler)
    try:
        hand_on(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)


def requeue(ends: str) -> Callable[[int, Any], object]:
    """Does what submitit does, with a command in place of scontrol that ends in the given way."""
    return lambda signum, frame: subprocess.check_call(["sh", "-c", ends])


@pytest.mark.parametrize("ends", ["kill $$", "kill -9 $$"])
def test_what_gives_the_job_back_may_be_killed_with_the_job(slurm, ends):
    """The job is then requeued, and the run waits for its own end."""
    slurm.says = ["JobState=REQUEUED"]
    handed_to(requeue(ends))
    assert 30 <= sum(slurm.slept) <= 50


def test_a_job_that_is_not_given_back_is_an_error(slurm):
    with pytest.raises(subprocess.CalledProcessError):
        handed_to(requeue("exit 1"))
    assert not slurm.asked


def test_it_waits_no_longer_than_slurm_says_so(slurm):
    ends, runs = "JobState=PREEMPTED", "JobState=RUNNING PreemptTime=None"
    slurm.says = [ends, ends, runs]
    hand_on(signal.SIGTERM)
    assert 0 < sum(slurm.slept) < 60


@pytest.mark.parametrize(
    "said",
    [
        "JobId=12 JobState=RUNNING Reason=None PreemptEligibleTime=2026-11-26 PreemptTime=None",
        "",
        FileNotFoundError("scontrol"),
        subprocess.TimeoutExpired("scontrol", 10),
        PermissionError("scontrol"),
    ],
)
def test_after_a_sigterm_that_is_not_slurms_nothing_is_waited_for(slurm, said):
    """`timeout 60 nerve-run` in a job; or a controller that does not answer."""
    slurm.says = [said]
    hand_on(signal.SIGTERM)
    assert sum(slurm.slept) == 0


def test_slurm_is_asked_in_its_jobs_after_sigterm_alone(slurm, monkeypatch):
    slurm.says = ["JobState=PREEMPTED"]
    hand_on(signal.SIGUSR1)
    monkeypatch.delenv("SLURM_JOB_ID")
    hand_on(signal.SIGTERM)
    assert not slurm.asked
    assert not slurm.slept


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
