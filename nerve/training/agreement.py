"""How the processes of a run agree on what each of them notices by itself."""

import time

from nerve.measuring.messages import gathered
from nerve.measuring.processes import n_processes

DECIDES_WITHIN_S = 1.0
"""About how long a wish waits until it is heard: the time between two exchanges."""

MOST_STEPS = 32
"""The most steps between two exchanges, because the next steps may take longer."""


class Agreement:
    """The highest wish of all processes, heard by all of them at the end of the same step.

    If a single process notices something, such as a signal or that the time is up, all must act on
    it at the same step, because they save and stop together. The wishes are exchanged between the
    hosts, and no process waits for its device. They are exchanged about once a second, or after
    each step if steps take longer. If steps suddenly become longer, a wish waits for up to
    `MOST_STEPS` of them.
    """

    def __init__(self) -> None:
        self._left = 1
        self._n_steps = 0
        self._since = time.monotonic()

    def on(self, wish: int) -> int:
        """The highest wish of all processes; 0 between exchanges. All processes must call this at
        the end of each step.

        Args:
            wish: of this process, 0 for none; to be repeated until it is heard.
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
        # All processes compute the same number.
        self._left = max(1, min(MOST_STEPS, int(DECIDES_WITHIN_S / max(slowest, 1e-9))))
        self._n_steps, self._since = 0, now
        return max(theirs for theirs, _ in of_all)
