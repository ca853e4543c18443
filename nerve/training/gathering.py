"""How the processes of a run meet, without waiting for one that will not come."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Self, TypeVar

import lightning as L
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed import TCPStore

from nerve.errors import NotGatheredError, first_line, noted
from nerve.measuring.departures import TOGETHER, Exit, reason_of_others
from nerve.training.launching import (
    Children,
    exit_of,
    has_lost_parent,
    require_parent,
    take_ctrl_c,
)
from nerve.training.signals import Interrupted
from nerve.training.watching import watching

START_WITHIN_S = 1800.0
"""How long to wait for all processes, as long as torch does: preparing data may take one of them a
while."""

NOTIFY_WITHIN_S = 60.0
"""How long the first process, after it failed, waits until the others have received the reason."""

NOTIFY_WHEN_STOPPED_WITHIN_S = 5.0
"""The same after a signal to stop, which the other processes have probably received as well."""

_DONE, _STOPPED, _REFUSED = "done", "stopped: ", "refused: "

POLL_S = 0.05
WARN_AFTER_S = 30.0

log = logging.getLogger(__name__)

T = TypeVar("T")


class Gathering:
    """What the processes of a run tell each other before they form a torch process group.

    torch waits half an hour for a process that does not come, and ignores signals meanwhile. Here
    each process waits in short steps, and one that cannot come tells the others why. They meet at
    the port where torch opens its store afterwards; in the process that serves both stores, they
    share the port.

    As a context manager, it tells the others about an error that ends the block before all
    processes have come.

    Args:
        environment: what started the processes.
        n_processes: number of processes of the run; with one, nothing is exchanged.
        leads: whether this process is the first, which decides whether there is anything to do.
    """

    def __init__(self, environment: ClusterEnvironment, n_processes: int, leads: bool) -> None:
        self.environment = environment
        self._n = n_processes
        self._leads = leads
        self._store: TCPStore | None = None
        self._are_there = n_processes == 1
        self._are_started = environment.creates_processes_externally
        self._children = Children()
        self._prefix = f"nerve/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._are_there and isinstance(error, Interrupted) and error.at_once:
            self._children.kill()
        has_met_none = self._store is None and isinstance(error, NotGatheredError)
        if self._are_there or not self._are_started or has_met_none:
            return
        n_ended = self._children.end()
        if n_ended + 1 == self._n:
            return  # on one node, there is nobody else
        if error is None:
            self._announce_end(_DONE, NOTIFY_WITHIN_S, n_ended)
            return
        with noted(error):
            if isinstance(error, Exception):
                reason = f"{_REFUSED}{error or type(error).__name__}"
                self._announce_end(reason, NOTIFY_WITHIN_S, n_ended)
            else:
                why = error.__cause__ or error
                self._announce_end(f"{_STOPPED}{why}", NOTIFY_WHEN_STOPPED_WITHIN_S, n_ended)

    def begin(self) -> bool:
        """Whether there is a run to take part in; all processes but the first wait for its answer.

        Raises:
            NotGatheredError: if the first process fails, with its reason.
            Interrupted: if the first process was stopped by a signal.
        """
        if self._are_there:
            return True
        if self._leads:
            self._opened().set(f"{self._prefix}/begun", "")
            return True
        take_ctrl_c()  # from here on, it is handled
        return self._wait_for(lambda store: store.check([f"{self._prefix}/begun"]))

    def start_others(self, trainer: L.Trainer) -> None:
        """Starts the other processes now. Lightning would start them only when the fit begins; this
        process, which has loaded the data and built the model by then, would wait until they have,
        too."""
        launcher = trainer.strategy.launcher
        is_left_to_it = not (self._are_there or self._are_started)
        if is_left_to_it and isinstance(launcher, _SubprocessScriptLauncher):
            self._are_started = True
            self._children.start(launcher)

    def before(self, trainer: L.Trainer) -> None:
        """Makes the trainer wait here for all processes before torch does."""
        if not self._are_there:
            self._connect = trainer.strategy.setup_environment
            trainer.strategy.setup_environment = self._gather  # type: ignore[method-assign]

    def _gather(self) -> None:
        self._are_started = True
        self._opened().add(f"{self._prefix}/come", 1)
        self._wait_for(lambda store: store.add(f"{self._prefix}/come", 0) >= self._n)
        self._are_there = True
        self._connect()

    @contextmanager
    def watching(self, lost: Callable[[NotGatheredError], None]) -> Iterator[Mapping[int, Exit]]:
        """Watches, while the block runs, the processes that this one has started, or the one that
        has started it. If one of them fails and the block still waits for it, ends this process and
        those that it has started.

        Args:
            lost: called with the reason before that, by another thread.

        Yields:
            those that have exited so far, by rank. One that has ended well is among them,
            but does not end anything.
        """
        exits: dict[int, Exit] = {}

        def look() -> bool:
            ended = self._children.ended()
            exits.update({rank: exit_of(status) for rank, status in ended.items()})
            return any(ended.values()) or has_lost_parent()

        def give_up() -> None:
            try:
                lost(reason_of_others() or NotGatheredError(f"{TOGETHER}; the first one ended"))
            finally:
                self._children.kill()

        with watching(look, give_up):
            yield exits

    def _wait_for(self, has_come: Callable[[TCPStore], bool]) -> bool:
        """Waits in short steps; returns False if there is nothing to do."""
        store, patience = self._opened(), _Patience(self._where, self._n)
        while not _query_store(lambda: has_come(store)):
            ended = self._children.ended()
            require_parent()
            reason = _query_store(lambda: self._announced_end(store))
            if reason == _DONE:
                return False
            if reason is not None and reason.startswith(_STOPPED):
                raise Interrupted(f"another process of the run was {reason}")
            if reason is not None:
                raise NotGatheredError(
                    "A run needs all of its processes; another one ended: "
                    f"{reason.removeprefix(_REFUSED)}"
                )
            if ended:
                exited = exit_of(next(iter(ended.values())))
                if exited.is_stop:
                    raise Interrupted(f"another process of the run {exited.how}")
                raise NotGatheredError(
                    f"A run needs all of its processes; one that this one has started {exited.how} "
                    "during the start. Its own output may say why."
                )
            patience.wait()
        return True

    def _announced_end(self, store: TCPStore) -> str | None:
        key = f"{self._prefix}/ended"
        return store.get(key).decode() if store.check([key]) else None

    def _announce_end(self, why: str, within_s: float, n_ended: int) -> None:
        """Tells the others why this process ends, unless a reason was given before; the first
        process waits until all have received it, except `n_ended` that it has ended itself."""
        until = time.monotonic() + within_s
        while self._store is None and not self._leads and not self._is_open():
            if time.monotonic() > until:
                return  # the first process has already ended
            time.sleep(POLL_S)
        store = self._opened()
        if self._announced_end(store) is None:
            store.set(f"{self._prefix}/ended", why)
        n_notified = store.add(f"{self._prefix}/heard", 1 + n_ended)
        while self._leads and n_notified < self._n and time.monotonic() < until:
            time.sleep(POLL_S)
            n_notified = store.add(f"{self._prefix}/heard", 0)

    def _opened(self) -> TCPStore:
        """The store, which the first process or torchrun serves."""
        if self._store is None:
            address, port = self._where
            serves = self._leads and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            patience = _Patience(self._where, self._n)
            while not serves and not self._is_open():
                require_parent()
                patience.wait()
            self._store = _query_store(
                lambda: TCPStore(
                    address,
                    port,
                    is_master=serves,
                    timeout=timedelta(seconds=NOTIFY_WITHIN_S),
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
    """Waits for the others in short steps, warns after a while, and fails after half an hour."""

    def __init__(self, where: tuple[str, int], n: int) -> None:
        self._since = time.monotonic()
        self._has_warned = False
        self._what = f"{n} processes of a run, which meet at {where[0]}:{where[1]}"

    def wait(self) -> None:
        waited_s = time.monotonic() - self._since
        if waited_s > START_WITHIN_S:
            raise NotGatheredError(
                f"All {self._what}, must start within {START_WITHIN_S / 60:g} minutes; some have "
                "not. Read the output of the others; trainer.devices times trainer.num_nodes must "
                "be the number of processes that are started."
            )
        if waited_s > WARN_AFTER_S and not self._has_warned:
            log.warning("still waiting for some of the %s", self._what)
            self._has_warned = True
        time.sleep(POLL_S)


def _query_store(query: Callable[[], T]) -> T:
    """What the store answers."""
    try:
        return query()
    except RuntimeError as error:  # the base class of the errors of torch.distributed
        raise NotGatheredError(
            "A run needs all of its processes; the first one cannot be reached, or ended "
            f"without giving a reason: {first_line(error)}"
        ) from error
