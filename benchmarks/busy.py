"""How much longer the default run takes where other processes keep its cores busy.

Each case is a run of its own on two cores of its own, beside none, one or two processes that never
rest; as many cases at once as there are pairs of cores. What is varied is for how long a thread of
OpenMP spins before it sleeps (GOMP_SPINCOUNT): as nerve-run sets it, as the system does, and some
counts. Several rounds give mean and worst.
"""

import argparse
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

SYSTEM = "300000"
"""What libgomp takes where nothing is set and threads are no more than cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", nargs="*", default=["0", "1000", "10000", SYSTEM])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--limit", type=float, default=100, help="seconds that a run may take")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    pairs: SimpleQueue[tuple[int, int]] = SimpleQueue()
    for pair in zip(cores[::2], cores[1::2], strict=False):
        pairs.put(pair)
    print(f"{pairs.qsize()} pairs of cores", flush=True)
    took: dict[tuple[str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        run(None, 0, args, pairs, Path(folder))  # tokenizes

        def case(name: str | None, busy: int) -> None:
            seconds = run(name, busy, args, pairs, Path(folder))
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
        alone = statistics.mean(took[name, 0])
        mean = statistics.mean(values)
        print(
            f"{name:>20}, {busy} busy: mean {mean:6.1f} s, worst {max(values):6.1f}, "
            f"{mean / alone:.2f} times alone"
        )


def run(
    count: str | None,
    busy: int,
    args: argparse.Namespace,
    pairs: "SimpleQueue[tuple[int, int]]",
    folder: Path,
) -> float:
    """Seconds of one run, start and end included; the limit where it takes longer."""
    pair = pairs.get()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    if count is not None:
        environment["GOMP_SPINCOUNT"] = count
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
            command, env=environment, capture_output=True, text=True, timeout=args.limit
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


if __name__ == "__main__":
    main()
