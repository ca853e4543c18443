"""Settings of the whole process that several threads need at the same time."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


class SharedContext:
    """A context of the whole process: the first thread that needs it enters it, the last leaves it.

    If each thread saved a global setting and restored it, the second thread would save what the
    first has set. The first would then restore the setting while the second still needs it, and the
    second would set it again, for good.

    Args:
        make: returns the context manager that changes the setting and restores it.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._n_inside = 0
        self._entered = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._n_inside:
                self._entered.enter_context(self._make())
            self._n_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_inside -= 1
                if not self._n_inside:
                    self._entered.close()
