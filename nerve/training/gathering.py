"""Several processes of one run: how they come together, none waiting for one that will not come,
and what they decide together, although each finds it by itself."""

import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Self, TypeVar

import lightning as L
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch.distributed import TCPStore

from nerve.errors import ConfigError, NotGatheredError, noted
from nerve.measuring.distributed import gathered, n_processes
from nerve.training.signals import Interrupted

COME_WITHIN_S = 1800.0
"""As torch waits for the processes of a group; data may take long on one of them."""

HEARD_WITHIN_S = 60.0
"""How long the first process, having refused, stays there for those that have not heard of it."""

HEARD_WHEN_STOPPED_WITHIN_S = 5.0
"""The same where it was told to stop: then whoever told it has likely told the others."""

_DONE, _STOPPED, _REFUSED = "done", "stopped: ", "refused: "

POLL_S = 0.05
SAID_AFTER_S = 30.0

log = logging.getLogger(__name__)

T = TypeVar("T")


def environment_of(is_alone: bool) -> ClusterEnvironment:
    """What started the processes of a run: Lightning's choice, but that of a run of one process is
    nobody, whatever the job around it says of its tasks."""
    if is_alone:
        return LightningEnvironment()
    if TorchElasticEnvironment.detect():  # torchrun, also inside a job of SLURM
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        # Lightning's own requeueing would act beside ours, and beside submitit's.
        try:
            return SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:  # of tasks that it cannot number
            raise ConfigError(f"Tasks of SLURM must be one for each device: {error}") from error
    for kind in (LSFEnvironment, MPIEnvironment):
        if kind.detect():
            return kind()
    return LightningEnvironment()


class Gathering:
    """What the processes of a run tell each other before they are a group of torch's.

    torch waits half an hour for a process that does not come, deaf to signals. Here each waits in
    short steps, and one that cannot come says so, with its reason. They meet at the port where
    torch opens its store afterwards; within the process that has opened it, both share it.

    As a context manager it tells the others of an error that ends the block before all have come.

    Args:
        environment: what started them.
        n_processes: of the run; of one, nothing is to be told.
        leads: whether this process is the first, which decides whether there is anything to do.
    """

    def __init__(self, environment: ClusterEnvironment, n_processes: int, leads: bool) -> None:
        self.environment = environment
        self._n = n_processes
        self._leads = leads
        self._store: TCPStore | None = None
        self._are_there = n_processes == 1
        # A launcher of Lightning's own starts the others once the first has begun.
        self._are_started = environment.creates_processes_externally
        self._prefix = f"nerve/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        has_met_none = self._store is None and isinstance(error, NotGatheredError)
        if self._are_there or not self._are_started or has_met_none:
            return
        if error is None:
            self._tell(_DONE, HEARD_WITHIN_S)
            return
        with noted(error):
            if isinstance(error, Exception):
                self._tell(f"{_REFUSED}{error or type(error).__name__}", HEARD_WITHIN_S)
            else:
                why = error.__cause__ or error
                self._tell(f"{_STOPPED}{why}", HEARD_WHEN_STOPPED_WITHIN_S)

    def begin(self) -> bool:
        """Whether there is a run to take part in; of the others, once the first has said so.

        Raises:
            NotGatheredError: when the first refuses, with its reason.
            Interrupted: when it was told to stop.
        """
        if self._are_there:
            return True
        if self._leads:
            self._opened().set(f"{self._prefix}/begun", "")
            return True
        return self._wait_for(lambda store: store.check([f"{self._prefix}/begun"]))

    def before(self, trainer: L.Trainer) -> None:
        """Has the trainer wait here for all processes before torch does."""
        if not self._are_there:
            self._connect = trainer.strategy.setup_environment
            trainer.strategy.setup_environment = self._gather  # type: ignore[method-assign]

    def _gather(self) -> None:
        self._are_started = True
        self._opened().add(f"{self._prefix}/come", 1)
        self._wait_for(lambda store: store.add(f"{self._prefix}/come", 0) >= self._n)
        self._are_there = True
        self._connect()

    def _wait_for(self, has_come: Callable[[TCPStore], bool]) -> bool:
        """Waits in short steps; False where there is nothing to do."""
        store, patience = self._opened(), _Patience(self._where, self._n)
        while not _asked(lambda: has_come(store)):
            told = _asked(lambda: self._told(store))
            if told == _DONE:
                return False
            if told is not None and told.startswith(_STOPPED):
                raise Interrupted(f"another process of the run was {told}")
            if told is not None:
                raise NotGatheredError(
                    "All processes of a run run it, or none; another one ended: "
                    f"{told.removeprefix(_REFUSED)}"
                )
            patience.wait()
        return True

    def _told(self, store: TCPStore) -> str | None:
        key = f"{self._prefix}/ended"
        return store.get(key).decode() if store.check([key]) else None

    def _tell(self, why: str, within_s: float) -> None:
        """Tells the others why this process ends, unless they know why they do; the first stays
        until all have heard of it."""
        until = time.monotonic() + within_s
        while self._store is None and not self._leads and not self._is_open():
            if time.monotonic() > until:
                return  # it has ended before
            time.sleep(POLL_S)
        store = self._opened()
        if self._told(store) is None:
            store.set(f"{self._prefix}/ended", why)
        n_heard = store.add(f"{self._prefix}/heard", 1)
        while self._leads and n_heard < self._n and time.monotonic() < until:
            time.sleep(POLL_S)
            n_heard = store.add(f"{self._prefix}/heard", 0)

    def _opened(self) -> TCPStore:
        """The store, which the first process serves, or torchrun for it."""
        if self._store is None:
            address, port = self._where
            serves = self._leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            patience = _Patience(self._where, self._n)
            while not serves and not self._is_open():
                patience.wait()
            self._store = _asked(
                lambda: TCPStore(
                    address,
                    port,
                    is_master=serves,
                    timeout=timedelta(seconds=HEARD_WITHIN_S),
                    wait_for_workers=False,
                    multi_tenant=True,
                )
            )
        return self._store

    @property
    def _where(self) -> tuple[str, int]:
        return self.environment.main_address, self.environment.main_port

    def _is_open(self) -> bool:
        with suppress(OSError), socket.create_connection(self._where, timeout=1):
            return True
        return False


class _Patience:
    """Waits for others in short steps, says so after a while, and ends after half an hour."""

    def __init__(self, where: tuple[str, int], n: int) -> None:
        self._since = time.monotonic()
        self._has_said = False
        self._what = f"{n} processes of a run, which meet at {where[0]}:{where[1]}"

    def wait(self) -> None:
        waited_s = time.monotonic() - self._since
        if waited_s > COME_WITHIN_S:
            raise NotGatheredError(
                f"All {self._what}, come within {COME_WITHIN_S / 60:g} minutes; some have not. See "
                "what the others say; trainer.devices times trainer.num_nodes must be the number "
                "of processes that are started."
            )
        if waited_s > SAID_AFTER_S and not self._has_said:
            log.warning("waiting for the others of %s", self._what)
            self._has_said = True
        time.sleep(POLL_S)


def _asked(ask: Callable[[], T]) -> T:
    """What the store answers."""
    try:
        return ask()
    except RuntimeError as error:  # those of torch.distributed are
        raise NotGatheredError(
            "All processes of a run run it, or none; the first one cannot be reached, or has ended "
            f"without a word: {str(error).splitlines()[0]}"
        ) from error


DECIDES_WITHIN_S = 1.0
"""How long a wish waits to be heard, about: the steps that take so long go without an exchange."""


MOST_STEPS = 32
"""The most steps that do, as the next ones may take longer."""


class Agreement:
    """The highest wish of all processes, heard by all of them at the end of the same step.

    What one process alone finds, such as a signal or that time is over, the others must act upon at
    that very step: they save and stop together. The wishes go from host to host, and no process
    waits for its device. They are exchanged once in a while: after each step where steps are slow,
    so that a run stops within the step that it is told to.
    """

    def __init__(self) -> None:
        self._left = 1
        self._n_steps = 0
        self._since = time.monotonic()

    def on(self, wish: int) -> int:
        """The highest wish of all; 0 where it is not the time to ask. To be called by all of them
        at the end of each step.

        Args:
            wish: this process's, 0 for none. It is to be repeated until it was heard.
        """
        if n_processes() == 1:
            return wish
        self._left -= 1
        self._n_steps += 1
        if self._left:
            return 0
        now = time.monotonic()
        of_all = gathered((wish, (now - self._since) / self._n_steps))
        slowest = max(seconds for _, seconds in of_all)
        # The same number in all processes.
        self._left = max(1, min(MOST_STEPS, int(DECIDES_WITHIN_S / max(slowest, 1e-9))))
        self._n_steps, self._since = 0, now
        return max(theirs for theirs, _ in of_all)
