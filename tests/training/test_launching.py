"""The processes that one of a run starts: how they begin and end with it."""

import os
import signal
import subprocess
import threading

import pytest
from launchers import IGNORES, WAITS, Launcher
from lightning.pytorch.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from nerve.errors import ConfigError, NotGatheredError
from nerve.training import launching
from nerve.training.launching import (
    Children,
    environment_of,
    exit_of,
    require_parent,
    take_ctrl_c,
)
from nerve.training.signals import Interrupted


def test_all_are_ended_also_one_that_does_not_obey(alone):
    children, launcher = Children(), Launcher(WAITS, IGNORES + WAITS)
    assert children.end() == 0
    children.start(launcher)
    assert children.ended() == {}
    assert children.end() == 2
    assert [each.wait(10) for each in launcher.procs] == [-signal.SIGTERM, -signal.SIGKILL]
    assert children.ended() == {1: -signal.SIGTERM, 2: -signal.SIGKILL}


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda signum: signum.name
)
def test_another_signal_while_they_are_ended_kills_those_that_are_left(alone, monkeypatch, signum):
    monkeypatch.setattr(launching, "ENDS_WITHIN_S", 60.0)
    children, launcher = Children(), Launcher(WAITS, IGNORES + WAITS, IGNORES + WAITS)
    children.start(launcher)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signum))
    timer.start()
    with pytest.raises(Interrupted, match=signum.name):
        children.end()
    assert [each.wait(10) for each in launcher.procs] == [-signal.SIGTERM, *[-signal.SIGKILL] * 2]


def test_ctrl_c_is_left_to_the_process_that_started_the_others(alone):
    """A terminal sends it to all of them; one that came meanwhile is not lost."""

    class Interrupting(Launcher):
        def _call_children_scripts(self) -> None:
            super()._call_children_scripts()
            signal.raise_signal(signal.SIGINT)  # to this thread, which blocks it

    children, launcher = Children(), Interrupting(WAITS)
    with pytest.raises(KeyboardInterrupt):
        children.start(launcher)
    assert children.end() == 1
    assert launcher.procs[0].wait(10) == -signal.SIGTERM
    assert "NERVE_PARENT" not in os.environ


def test_those_that_are_started_do_not_take_ctrl_c(alone):
    children, launcher = Children(), Launcher(WAITS)
    children.start(launcher)
    (child,) = launcher.procs
    child.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    assert children.end() == 1
    assert child.wait(10) == -signal.SIGTERM


def test_ctrl_c_that_came_before_is_taken_where_another_process_blocked_it(monkeypatch):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        signal.raise_signal(signal.SIGINT)  # to this thread, which blocks it
        take_ctrl_c()
        monkeypatch.setenv("NERVE_PARENT", str(os.getppid()))
        with pytest.raises(KeyboardInterrupt):
            take_ctrl_c()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_those_of_another_node_have_the_ranks_that_follow_that_of_this_process(alone, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "2")
    children, launcher = Children(), Launcher(WAITS, WAITS)
    children.start(launcher)
    children.kill()
    for each in launcher.procs:
        each.wait(10)
    assert children.ended() == {7: -signal.SIGKILL, 8: -signal.SIGKILL}


@pytest.mark.parametrize(
    ("status", "how", "is_stop"),
    [
        (0, "ended with status 0", False),
        (3, "ended with status 3", False),
        (-signal.SIGKILL, "was killed by SIGKILL", False),
        (-signal.SIGINT, "was killed by SIGINT", True),
        (128 + signal.SIGTERM, "ended with status 143", True),
        (-40, "was killed by signal 40", False),
    ],
)
def test_an_exit_status_in_words(status, how, is_stop):
    assert exit_of(status) == (how, is_stop)


def test_the_process_that_started_this_one_must_not_have_ended(monkeypatch):
    require_parent()
    monkeypatch.setenv("NERVE_PARENT", str(os.getppid()))
    require_parent()
    monkeypatch.setenv("NERVE_PARENT", str(os.getpid()))  # which is not that of this process
    with pytest.raises(NotGatheredError, match="the first one ended without giving a reason"):
        require_parent()


SRUN = {
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_JOB_NAME": "job",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({}, LightningEnvironment),
        (SRUN, SLURMEnvironment),
        (TORCHRUN, TorchElasticEnvironment),
        (SRUN | TORCHRUN, TorchElasticEnvironment),
    ],
    ids=["none", "srun", "torchrun", "torchrun in a job"],
)
def test_what_started_the_processes_is_told_by_what_it_sets(monkeypatch, variables, kind):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert type(environment_of(is_alone=False)) is kind
    assert type(environment_of(is_alone=True)) is LightningEnvironment


def test_tasks_that_lightning_does_not_take_are_refused(monkeypatch):
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ConfigError, match="--ntasks-per-node=2"):
        environment_of(is_alone=False)
