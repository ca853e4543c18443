"""What the processes of a run decide together, although each finds it by itself."""

import time

from nerve.measuring.distributed import gathered, n_processes

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
