"""Takes measurements during training to the rows of a run: pooled, solved and written."""

from collections.abc import Iterable, Sequence

import torch

from nerve.measuring.clock import Clock
from nerve.measuring.ffns import FFN
from nerve.measuring.measurement import Measurement
from nerve.recording.aside import Aside, Pace
from nerve.recording.preparation import Preparation
from nerve.recording.solver import Eigenproblem, Labels, Solved, Solver
from nerve.recording.staging import expected_bytes
from nerve.recording.workers import spare_workers
from nerve.recording.writer import SpectraWriter


class Pipeline:
    """What happens to a measurement once its last forward pass is over, while training goes on as
    far as possible.

    Every process of a run must make the same calls. They share the solving.

    Args:
        ffns: the FFNs that are measured; memory for their eigenproblems is allocated now.
        device: where the model trains.
        writer: writes the rows, and passes them to loggers.
        clock: counts the time that this takes from training.
        rank: the rank of this process.
        n_processes: number of training processes.
        n_here: how many of them share the cores of this host.
    """

    def __init__(
        self,
        ffns: Sequence[FFN],
        device: torch.device,
        writer: SpectraWriter,
        clock: Clock,
        *,
        rank: int = 0,
        n_processes: int = 1,
        n_here: int = 1,
    ) -> None:
        n_bytes = max(map(expected_bytes, ffns))
        self._solver = Solver(device, spare_workers(device, n_here, n_bytes), n_bytes)
        self._aside, self._pace = Aside(device), Pace(device)
        self._preparation = Preparation(device)
        self._writer, self._clock = writer, clock
        self._rank, self._n_processes = rank, n_processes

    def submit(self, labels: Labels, measurement: Measurement, *, of_all: bool) -> None:
        """Accepts a measurement, and writes what has been solved by then.

        Args:
            labels: of its step.
            measurement: all of its forward passes must be over.
            of_all: whether to pool it over all processes, each of which saw part of the samples.

        Raises:
            MeasurementError: for a measurement that could not be solved.
        """
        with self._clock:
            with self._aside.work_on(measurement):
                if of_all:
                    measurement.reduce()
                mine = (self._rank, self._n_processes)
                share: list[Eigenproblem] = [*measurement.eigenproblems(*mine)]
                share += measurement.group_eigenproblems(*mine)
                solved = self._solver.submit(labels, share)
            self._preparation.start(measurement.products)
            self._write(solved)

    def end_step(self) -> None:
        """Writes what has been solved by now; call it after each training step."""
        self._pace.end_step()
        self._aside.let_go()
        self._write(self._solver.finished())

    def drain(self) -> None:
        """Waits for everything that is being solved, and writes it."""
        self._write(self._solver.drain())

    def close(self, *, wait: bool) -> None:
        """Ends the threads; pending work is dropped. For `wait` see `Aside.close`."""
        self._solver.close()
        self._aside.close(wait=wait)
        self._preparation.close(wait=wait)

    def _write(self, solved: Iterable[Solved]) -> None:
        for each in solved:
            with self._clock:
                self._writer.write([each])
