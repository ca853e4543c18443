"""What solving spectra on the GPU costs training, by the CUDA priority of training's stream.

A GPT trains while a thread solves float64 `eigvalsh` on a stream of the lowest priority, as a
measurement leaves them to the GPU. Training runs on a stream of each priority in turn. Printed are
a step alone and beside solving, the seconds until all is solved, and by how many seconds the steps
meanwhile exceed as many steps alone. With `--graphs` the priority reaches only what runs outside
the graphs: inductor captures on a stream of its own, whose priority the kernels of a graph keep.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gpt_loops import SIZES, Size, Trained, Windows, make_model, moved, optimizer_of


class Training:
    """Steps of one model on a stream, on which all that they need is made as well."""

    def __init__(self, size: Size, mode: str, priority: int) -> None:
        self._stream = torch.cuda.Stream(priority=priority)
        with torch.cuda.stream(self._stream):
            self._trained = Trained(make_model(size), "cuda", mode)
            self._optimizer = optimizer_of(self._trained.model)
            batch = next(iter(Windows(size).train_dataloader()))
            self._batch = tuple(moved(each, "cuda") for each in batch)
        self.seconds(lambda n: n < 10)

    def seconds(self, is_unfinished: Callable[[int], bool]) -> list[float]:
        """Of each step, as long as it goes on, given how many there were."""
        times: list[float] = []
        with torch.cuda.stream(self._stream):
            self._stream.synchronize()
            last = time.perf_counter()
            while is_unfinished(len(times)):
                self._trained.step(self._optimizer, self._batch)
                self._stream.synchronize()
                now = time.perf_counter()
                times.append(now - last)
                last = now
        return times


class Solving(threading.Thread):
    """Solves an eigenproblem `n` times on a stream of the lowest priority."""

    def __init__(self, matrix: Tensor, n: int) -> None:
        super().__init__()
        self._matrix, self._n = matrix, n
        lowest, _ = torch.cuda.Stream.priority_range()
        self._stream = torch.cuda.Stream(priority=lowest)
        self.seconds = 0.0

    def run(self) -> None:
        began = time.perf_counter()
        with torch.cuda.stream(self._stream):
            for _ in range(self._n):
                torch.linalg.eigvalsh(self._matrix)
            self._stream.synchronize()
        self.seconds = time.perf_counter() - began


class Beside(NamedTuple):
    """Seconds: of steps alone, of steps while spectra are solved, and until all are solved."""

    alone: list[float]
    steps: list[float]
    solved: float

    @property
    def cost(self) -> float:
        return sum(self.steps) - len(self.steps) * statistics.mean(self.alone)


def beside(training: Training, solving: Solving, n_alone: int) -> Beside:
    alone = training.seconds(lambda n: n < n_alone)
    solving.start()
    steps = training.seconds(lambda n: solving.is_alive())
    solving.join()
    return Beside(alone, steps, solving.seconds)


def covariance(dim: int) -> Tensor:
    """In float64, `dim` x `dim`."""
    x = torch.randn(2 * dim, dim, device="cuda", dtype=torch.float64)
    matrix = x.T @ x / len(x)
    torch.cuda.synchronize()  # other streams read it
    return matrix


def print_result(priority: int, found: list[Beside]) -> None:
    costs = [each.cost for each in found]
    alone, steps = ([s for each in found for s in each[i]] for i in (0, 1))
    print(
        f"training at priority {priority:2}: costs it mean {statistics.mean(costs):.3f} s, worst "
        f"{max(costs):.3f}; a step {1e3 * statistics.mean(alone):.1f} ms (worst "
        f"{1e3 * max(alone):.1f}), meanwhile {1e3 * statistics.mean(steps):.1f} (worst "
        f"{1e3 * max(steps):.1f}); solved in {statistics.mean(each.solved for each in found):.2f} "
        f"s (worst {max(each.solved for each in found):.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="125M", choices=SIZES)
    parser.add_argument("--d-ff", type=int, default=3072)
    parser.add_argument("--spectra", type=int, default=24)
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs for the steps")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    lowest, highest = torch.cuda.Stream.priority_range()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.size}, priorities "
        f"{lowest} (lowest, of the stream that solves {args.spectra} of {args.d_ff}) to {highest}"
    )
    matrix = covariance(args.d_ff)
    Solving(matrix, 1).run()
    alone = Solving(matrix, args.spectra)
    alone.run()
    print(f"solving alone: {alone.seconds:.2f} s", flush=True)
    mode = "reduce-overhead" if args.graphs else "default"
    trainings = {each: Training(SIZES[args.size], mode, each) for each in (lowest, highest)}
    found: dict[int, list[Beside]] = {priority: [] for priority in trainings}
    for _ in range(args.repeats):
        for priority, training in trainings.items():
            found[priority].append(beside(training, Solving(matrix, args.spectra), 30))
    for priority, each in found.items():
        print_result(priority, each)


if __name__ == "__main__":
    main()
