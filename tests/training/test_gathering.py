"""Processes that come to a run, or do not: none waits for one that will not come."""

import os
import signal
import threading
import time
from contextlib import nullcontext

import pytest
import torch.distributed as dist
from launchers import IGNORES, WAITS, Launcher
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from processes import held_port

from nerve.errors import ConfigError, DataError, NotGatheredError, StoreError
from nerve.measuring.departures import Exit, knowing_others
from nerve.training import gathering, watching
from nerve.training.gathering import Gathering
from nerve.training.signals import Interrupted, StopSignals


class Strategy:
    """The part of a trainer that a gathering uses."""

    def __init__(self) -> None:
        self.connected = False
        self.launcher: _SubprocessScriptLauncher | None = None

    def setup_environment(self) -> None:
        self.connected = True


class Trainer:
    def __init__(self) -> None:
        self.strategy = Strategy()


@pytest.fixture(autouse=True)
def _group(monkeypatch):
    """The environment variables that tell processes that they form one group."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with held_port() as port:
        monkeypatch.setenv("MASTER_PORT", port)
        yield


def of(n: int, *ways, late: dict[int, float] | None = None) -> list[BaseException | str]:
    """What becomes of `n` members, each in a thread: `ways[i]` is what the i-th does once it has
    begun, and the first also before, where it has two."""
    ends: list[BaseException | str] = [""] * n

    def member(i: int) -> None:
        trainer = Trainer()
        time.sleep((late or {}).get(i, 0))
        try:
            with Gathering(LightningEnvironment(), n, leads=i == 0) as members:
                before, after = ways[i]
                before()
                if not members.begin():
                    ends[i] = "nothing to do"
                    return
                after()
                members.before(trainer)
                trainer.strategy.setup_environment()
                assert trainer.strategy.connected
            ends[i] = "came"
        except BaseException as error:
            ends[i] = error

    threads = [threading.Thread(target=member, args=(i,)) for i in range(n)]
    with held_port() as port:
        os.environ["MASTER_PORT"] = port
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return ends


def comes() -> None:
    pass


def fails(error: BaseException):
    def fail() -> None:
        raise error

    return fail


GOOD = (comes, comes)


@pytest.mark.parametrize("late", [{0: 0.2}, {1: 0.2}])
def test_all_come(late):
    assert of(3, GOOD, GOOD, GOOD, late=late) == ["came"] * 3


@pytest.mark.parametrize(
    ("who", "when", "error"),
    [
        (0, "before it begins", StoreError("holds another run")),
        (0, "with its data", DataError("no corpus")),
        (1, "before it begins", ConfigError("no GPU here")),
        (2, "with its data", RuntimeError("any")),
    ],
)
def test_where_one_refuses_all_end_with_its_reason(who, when, error):
    way = (fails(error), comes) if when == "before it begins" else (comes, fails(error))
    ends = of(3, *(way if i == who else GOOD for i in range(3)))
    assert ends[who] is error
    for i in {0, 1, 2} - {who}:
        assert isinstance(ends[i], NotGatheredError)
        assert str(error) in str(ends[i])


def test_one_that_comes_after_the_first_has_refused_hears_of_it():
    refused = (fails(StoreError("holds another run")), comes)
    first, other = of(2, refused, GOOD, late={1: 0.4})
    assert isinstance(first, StoreError)
    assert "holds another run" in str(other)


def test_where_all_refuse_each_has_its_own_reason_and_none_waits():
    began = time.monotonic()
    ends = of(3, *((fails(ConfigError(str(i))), comes) for i in range(3)))
    assert [str(end) for end in ends] == ["0", "1", "2"]
    assert time.monotonic() - began < gathering.NOTIFY_WITHIN_S / 2


def test_where_one_is_stopped_all_are_interrupted():
    stopped = (comes, fails(Interrupted("stopped by SIGTERM")))
    for who in (0, 1):
        ends = of(2, *(stopped if i == who else GOOD for i in range(2)))
        assert all(isinstance(end, Interrupted) for end in ends)
        assert "stopped by SIGTERM" in str(ends[1 - who])


def test_where_the_first_finds_the_run_done_the_others_have_nothing_to_do(monkeypatch):
    ends = []

    def other() -> None:
        with Gathering(LightningEnvironment(), 2, leads=False) as members:
            ends.append(members.begin())

    thread = threading.Thread(target=other)
    thread.start()
    with Gathering(LightningEnvironment(), 2, leads=True):
        pass  # returns without having begun
    thread.join(10)
    assert ends == [False]


def test_the_first_waits_for_a_bounded_time_for_those_who_never_hear(monkeypatch):
    monkeypatch.setattr(gathering, "NOTIFY_WITHIN_S", 0.2)
    with (
        pytest.raises(StoreError, match="another run"),
        Gathering(LightningEnvironment(), 2, leads=True),
    ):
        raise StoreError("another run")


def test_who_never_comes_is_waited_for_a_bounded_time_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setattr(gathering, "START_WITHIN_S", 0.3)
    monkeypatch.setattr(gathering, "WARN_AFTER_S", 0.1)
    with (
        pytest.raises(NotGatheredError, match="some have not"),
        Gathering(LightningEnvironment(), 2, leads=False) as members,
    ):
        members.begin()
    assert caplog.text.count("still waiting for some of the 2 processes") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("leads", [False, True], ids=["for the first", "for the others"])
def test_a_process_that_waits_obeys_signals_at_once(monkeypatch, signum, leads):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(gathering, "NOTIFY_WHEN_STOPPED_WITHIN_S", 0.1)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signum))
    timer.start()
    trainer, began = Trainer(), time.monotonic()

    def come() -> None:
        with Gathering(LightningEnvironment(), 2, leads=leads) as members, StopSignals():
            members.begin()
            members.before(trainer)
            trainer.strategy.setup_environment()

    with pytest.raises(Interrupted, match=signal.Signals(signum).name):
        come()
    assert time.monotonic() - began < gathering.NOTIFY_WITHIN_S / 2


def test_torch_opens_its_own_store_where_they_have_met():
    """The port is the same: torch's group would not start if it were occupied."""
    with Gathering(LightningEnvironment(), 2, leads=True) as members:
        members.begin()
        port = members.environment.main_port
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
        dist.destroy_process_group()
        members._are_there = True


@pytest.mark.parametrize(
    "error", [DataError("no files"), Interrupted("stopped"), KeyboardInterrupt()]
)
def test_an_error_ends_the_processes_that_the_first_has_started(alone, error):
    trainer = Trainer()
    trainer.strategy.launcher = launcher = Launcher(WAITS)

    def lead() -> None:
        with Gathering(LightningEnvironment(), 2, leads=True) as members:
            members.begin()
            members.start_others(trainer)
            assert [each.poll() for each in launcher.procs] == [None]
            raise error

    with pytest.raises(type(error)):
        lead()
    assert [each.wait(10) for each in launcher.procs] == [-signal.SIGTERM]


def test_other_nodes_hear_why_a_node_ends_and_nobody_waits_for_the_ended_ones(alone, monkeypatch):
    """Two nodes of two processes; the second of this node is a child of the first."""
    ends: list[BaseException] = []

    def other_node() -> None:
        try:
            with Gathering(LightningEnvironment(), 4, leads=False) as members:
                members.begin()
                members.before(trainer := Trainer())
                trainer.strategy.setup_environment()
        except NotGatheredError as error:
            ends.append(error)

    environment, trainer = LightningEnvironment(), Trainer()
    trainer.strategy.launcher = Launcher(WAITS)
    threads = [threading.Thread(target=other_node) for _ in range(2)]

    def lead() -> None:
        with Gathering(environment, 4, leads=True) as members:
            members.begin()
            members.start_others(trainer)
            for thread in threads:
                thread.start()
            raise DataError("no files")

    began = time.monotonic()
    with pytest.raises(DataError):
        lead()
    for thread in threads:
        thread.join(10)
    assert ["no files" in str(end) for end in ends] == [True, True]
    assert time.monotonic() - began < gathering.NOTIFY_WITHIN_S / 2


def test_processes_that_something_else_starts_are_not_started_twice(alone, monkeypatch):
    trainer, environment = Trainer(), LightningEnvironment()
    trainer.strategy.launcher = launcher = Launcher(WAITS)
    Gathering(environment, 1, leads=True).start_others(trainer)
    monkeypatch.setenv("LOCAL_RANK", "0")
    Gathering(environment, 2, leads=True).start_others(trainer)
    assert launcher.procs == []


def gathered(launcher: Launcher, error: BaseException | None = None) -> None:
    """A fit whose processes have all come; then it ends, or raises the error."""
    trainer = Trainer()
    trainer.strategy.launcher = launcher
    with Gathering(LightningEnvironment(), 1 + len(launcher.codes), leads=True) as members:
        members.begin()
        members.start_others(trainer)
        members._opened().add(f"{members._prefix}/come", len(launcher.codes))  # as the others do
        members.before(trainer)
        trainer.strategy.setup_environment()
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [DataError("in the middle"), Interrupted("stopped"), None])
def test_processes_that_have_come_end_by_themselves(alone, error):
    launcher = Launcher(WAITS)
    with pytest.raises(type(error)) if error else nullcontext():
        gathered(launcher, error)
    (child,) = launcher.procs
    assert child.poll() is None
    child.kill()
    child.wait()


def test_a_second_ctrl_c_kills_processes_that_have_come(alone):
    """They may wait for this one in a collective, in which Python handles no signal."""
    launcher = Launcher(IGNORES + WAITS)
    with pytest.raises(Interrupted):
        gathered(launcher, Interrupted.by(signal.SIGINT, at_once=True))
    assert launcher.procs[0].wait(10) == -signal.SIGKILL


class Watched:
    """A fit of processes that run these codes; `exits` is what it knows of them."""

    def __init__(self, *codes: str) -> None:
        self.launcher = Launcher(*codes)
        self.members = Gathering(LightningEnvironment(), 1 + len(codes), leads=True)
        self.members._children.start(self.launcher)
        self.lost: list[NotGatheredError] = []

    def until_known(self, n: int) -> dict[int, Exit]:
        with self.members.watching(self.lost.append) as exits:
            until = time.monotonic() + 10
            while len(exits) < n and time.monotonic() < until:
                time.sleep(0.01)
        return dict(exits)

    def statuses(self) -> list[int]:
        return [each.wait(10) for each in self.launcher.procs]


DIES = "import os; print(flush=True); os.kill(os.getpid(), 9)"
FAILS = "print(flush=True); raise SystemExit(3)"
ENDS = "print(flush=True)"


@pytest.fixture
def ended(monkeypatch) -> threading.Event:
    """Is set where this process would be ended."""
    ended = threading.Event()

    def end(status: int) -> None:
        assert status == 1
        ended.set()

    monkeypatch.setattr(watching.os, "_exit", end)
    monkeypatch.setattr(watching, "POLL_S", 0.01)
    monkeypatch.setattr(watching, "GIVES_UP_AFTER_S", 0.1)
    return ended


def test_a_fit_knows_which_of_its_processes_have_exited(alone, ended):
    fit = Watched(DIES, FAILS, ENDS)
    assert fit.until_known(3) == {
        1: Exit("was killed by SIGKILL"),
        2: Exit("ended with status 3"),
        3: Exit("ended with status 0"),
    }
    assert fit.lost == []  # it ended in time


def test_a_fit_that_waits_for_a_failed_process_ends_with_all_others(alone, ended):
    fit = Watched(DIES, IGNORES + WAITS)
    with fit.members.watching(fit.lost.append) as exits, knowing_others(exits):
        assert ended.wait(10)
    assert fit.statuses() == [-signal.SIGKILL, -signal.SIGKILL]
    assert [str(error).partition("; ")[2] for error in fit.lost] == [
        "process 1 was killed by SIGKILL"
    ]


def test_processes_that_end_well_do_not_disturb_a_fit_that_goes_on(alone, ended):
    fit = Watched(ENDS, ENDS)
    with fit.members.watching(fit.lost.append) as exits:
        assert not ended.wait(0.5)
    assert (set(exits), fit.lost) == ({1, 2}, [])


def test_a_fit_whose_first_process_was_killed_does_not_wait_for_it(ended, monkeypatch):
    monkeypatch.setenv("NERVE_PARENT", str(os.getpid()))  # which is not that of this process
    lost: list[NotGatheredError] = []
    with Gathering(LightningEnvironment(), 2, leads=False).watching(lost.append):
        assert ended.wait(10)
    assert "the first one ended" in str(lost[0])


@pytest.mark.parametrize(
    ("status", "kind", "how"),
    [
        (0, NotGatheredError, "ended with status 0 during the start"),
        (7, NotGatheredError, "ended with status 7 during the start"),
        (130, Interrupted, "another process of the run ended with status 130"),
    ],
)
def test_a_process_that_ends_while_it_is_waited_for_ends_the_run(alone, status, kind, how):
    trainer, environment = Trainer(), LightningEnvironment()
    trainer.strategy.launcher = Launcher(f"print(flush=True); raise SystemExit({status})")

    def lead() -> None:
        with Gathering(environment, 2, leads=True) as members:
            members.begin()
            members.start_others(trainer)
            members.before(trainer)
            trainer.strategy.setup_environment()

    with pytest.raises(kind, match=how):
        lead()


def test_ctrl_c_that_came_during_the_imports_is_obeyed_once_it_is_handled(monkeypatch):
    monkeypatch.setenv("NERVE_PARENT", str(os.getppid()))
    monkeypatch.setattr(gathering, "NOTIFY_WHEN_STOPPED_WITHIN_S", 0.1)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def follow() -> None:
        with Gathering(LightningEnvironment(), 2, leads=False) as members, StopSignals():
            signal.raise_signal(signal.SIGINT)  # to this thread, which blocks it
            members.begin()

    try:
        with pytest.raises(Interrupted, match="SIGINT"):
            follow()
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_one_whose_parent_was_killed_does_not_wait_for_it(monkeypatch):
    monkeypatch.setenv("NERVE_PARENT", str(os.getpid()))  # which is not that of this process
    members = Gathering(LightningEnvironment(), 2, leads=False)
    with pytest.raises(NotGatheredError, match="the first one ended without giving a reason"):
        members.begin()


def test_one_process_tells_nobody():
    trainer = Trainer()
    with Gathering(LightningEnvironment(), 1, leads=True) as members:
        assert members.begin()
        members.before(trainer)
        trainer.strategy.setup_environment()
    assert trainer.strategy.connected
