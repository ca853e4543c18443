"""How long the default run takes by how threads of OpenMP wait: beside busy processes, and alone.

    python benchmarks/busy.py            # beside none, one and two processes that never rest
    python benchmarks/busy.py --alone    # the ratio of steps with and without, and its interval

What is varied is for how long a thread spins before it sleeps (GOMP_SPINCOUNT): as nerve-run sets
it, as the system does, and some counts.

**Beside others** each case is a run of its own on two cores of its own; as many cases at once as
there are pairs of cores. Several rounds give mean and worst.

**Alone** two runs, one as nerve-run sets it and one as the system does, take turns on two cores, A
B B A and then B A A B: a block of 25 steps with one measurement each, while the other sleeps. So
both see the same machine, and what the pair of blocks differs by is the setting. The first block of
each does not count. Each pair of processes gives a ratio; their mean has its 95% interval over the
pairs, as one process may be luckier than another with where its memory lies.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from nerve.analysis.statistics import student_t

SYSTEM = "300000"
"""What libgomp takes where nothing is set and threads are no more than cores."""

BLOCK = 25
"""Steps of a turn: the default run measures once in as many."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", nargs="*", default=["0", "1000", "10000", SYSTEM])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=float, default=100, help="seconds that a run may take")
    parser.add_argument("--alone", action="store_true", help="pairs of runs that take turns")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of processes, with --alone")
    parser.add_argument("--turns", type=int, default=4, help="blocks of each, with --alone; even")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.alone:
            alone(args.pairs, args.turns, Path(folder))
        else:
            beside_others(args, Path(folder))


def beside_others(args: argparse.Namespace, folder: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    pairs: SimpleQueue[tuple[int, int]] = SimpleQueue()
    for pair in zip(cores[::2], cores[1::2], strict=False):
        pairs.put(pair)
    print(f"{pairs.qsize()} pairs of cores", flush=True)
    took: dict[tuple[str, int], list[float]] = defaultdict(list)
    run(None, 0, args, pairs, folder)  # tokenizes

    def case(name: str | None, busy: int) -> None:
        seconds = run(name, busy, args, pairs, folder)
        took[name or "as nerve-run sets it", busy].append(seconds)

    with ThreadPoolExecutor(pairs.qsize()) as pool:
        cases = [
            pool.submit(case, count, busy)
            for _ in range(args.rounds)
            for busy in sorted(args.busy, reverse=True)
            for count in (None, *args.counts)
        ]
    for each in cases:
        each.result()
    for (name, busy), values in sorted(took.items()):
        by_itself = statistics.mean(took[name, 0])
        mean = statistics.mean(values)
        print(
            f"{name:>20}, {busy} busy: mean {mean:6.1f} s, worst {max(values):6.1f}, "
            f"{mean / by_itself:.2f} times alone"
        )


def environment_of(count: str | None) -> dict[str, str]:
    """That of a run whose threads spin so often; None leaves it to nerve-run."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    return environment if count is None else environment | {"GOMP_SPINCOUNT": count}


def run(
    count: str | None,
    busy: int,
    args: argparse.Namespace,
    pairs: "SimpleQueue[tuple[int, int]]",
    folder: Path,
) -> float:
    """Seconds of one run, start and end included; the limit where it takes longer."""
    pair = pairs.get()
    pin = ["taskset", "-c", ",".join(map(str, pair))]
    others = [
        subprocess.Popen([*pin, sys.executable, "-c", "while True: pass"]) for _ in range(busy)
    ]
    directory = tempfile.mkdtemp(dir=folder)
    command = [*pin, sys.executable, "-m", "nerve.cli.run", f"trainer.max_steps={args.steps}"]
    command += ["trainer.accelerator=cpu", f"hydra.run.dir={directory}"]
    try:
        began = time.perf_counter()
        ended = subprocess.run(
            command,
            env=environment_of(count),
            capture_output=True,
            text=True,
            timeout=args.limit,
        )
        if ended.returncode:
            sys.exit(ended.stderr[-3000:])
        return time.perf_counter() - began
    except subprocess.TimeoutExpired:
        return args.limit
    finally:
        for other in others:
            other.kill()
            other.wait()
        pairs.put(pair)


class Turns:
    """A default run in a process of its own, which trains a block of steps when it is told to."""

    def __init__(self, count: str | None, cores: str, folder: Path) -> None:
        turn, self._give_turn = os.pipe()
        self._answer, answered = os.pipe()
        command = ["taskset", "-c", cores, sys.executable, __file__, "--child"]
        command += [str(turn), str(answered), tempfile.mkdtemp(dir=folder)]
        self._process = subprocess.Popen(
            command,
            env=environment_of(count),
            stdout=subprocess.DEVNULL,
            pass_fds=(turn, answered),
        )
        os.close(turn)
        os.close(answered)
        self._wait()  # for all that comes before the first step

    def block(self) -> float:
        """Seconds that the next block takes."""
        os.write(self._give_turn, b".")
        return self._wait()

    def _wait(self) -> float:
        answer = os.read(self._answer, 100)
        if not answer:
            sys.exit(f"a run ended before its turn, with status {self._process.wait()}")
        return float(json.loads(answer))

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._give_turn)
        os.close(self._answer)


def alone(n_pairs: int, n_turns: int, folder: Path) -> None:
    """Prints the ratio of the steps' time, as nerve-run sets it to as the system does."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    ratios = []
    for number in range(n_pairs):
        began = time.perf_counter()
        ours, theirs = (Turns(count, cores, folder) for count in (None, SYSTEM))
        took: dict[Turns, list[float]] = {ours: [], theirs: []}
        order = [ours, theirs, theirs, ours] if number % 2 else [theirs, ours, ours, theirs]
        for each in (ours, theirs):
            each.block()
        for turn in range(2 * n_turns):
            each = order[turn % 4]
            took[each].append(each.block())
        ours.end()
        theirs.end()
        ratios.append(sum(took[ours]) / sum(took[theirs]))
        steps = ", ".join(f"{1000 * np.mean(took[each]) / BLOCK:.1f}" for each in took)
        print(
            f"pair {number + 1}: {steps} ms a step, as nerve-run sets it and as the system does: "
            f"{ratios[-1]:.4f} ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
    logs = np.log(ratios)
    half = float(student_t(np.array([n_pairs - 1]))[0]) * logs.std(ddof=1) / np.sqrt(n_pairs)
    low, middle, high = np.exp(logs.mean() + np.array([-half, 0, half]))
    print(
        f"alone, as nerve-run sets it: {middle:.4f} times the system's (95%: {low:.4f} to "
        f"{high:.4f}; {n_pairs} pairs, {n_turns} blocks of {BLOCK} steps each; at most 1.02)"
    )


def child(turn: int, answered: int, directory: str) -> None:
    """The default run, which answers with the seconds of each block and waits for the next."""
    import nerve.cli.run
    from nerve.cores import spin_briefly

    spin_briefly()  # as nerve-run does before it imports torch
    from lightning.pytorch import Callback, Trainer

    class InTurns(Callback):
        began = time.perf_counter()

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step % BLOCK == 0:
                os.write(answered, json.dumps(time.perf_counter() - self.began).encode())
                os.read(turn, 1)
                self.began = time.perf_counter()

    fit = Trainer.fit

    def fit_in_turns(trainer: Trainer, *arguments: Any, **named: Any) -> None:
        trainer.callbacks.append(InTurns())
        fit(trainer, *arguments, **named)

    Trainer.fit = fit_in_turns
    sys.argv = ["nerve-run", "trainer.accelerator=cpu", f"hydra.run.dir={directory}"]
    nerve.cli.run.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        main()
