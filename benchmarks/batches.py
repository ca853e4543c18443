"""How long it takes to copy a batch of tokens beside threads that solve spectra.

A batch on its way to a GPU is copied to pinned memory (without a GPU: to other memory). Torch does
that in several threads, `nerve.data.batches` in one. Meanwhile 0 or more threads of the lowest
priority solve float64 `eigvalsh`, as after a measurement. How long torch's threads spin while they
wait is set before torch is imported, so each setting has a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nerve.cores import SPINS
from nerve.data.batches import pinned
from nerve.recording.workers import NICENESS


def solve(ended: threading.Event) -> None:
    torch.set_num_threads(1)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    x = torch.randn(1500, 3000, dtype=torch.float64)
    covariance = x @ x.T
    while not ended.is_set():
        torch.linalg.eigvalsh(covariance)


def ways(has_gpu: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    if has_gpu:
        return {"torch": Tensor.pin_memory, "nerve": pinned}

    def alone(tensor: Tensor) -> Tensor:
        return torch.from_numpy(np.array(tensor.numpy()))

    return {"torch": Tensor.contiguous, "nerve": alone}


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """The ms of each copy, by its way."""
    tokens = torch.randint(50_000, (args.batch, args.seq_len + 1))
    n_threads, ended = torch.get_num_threads(), threading.Event()
    solving = [threading.Thread(target=solve, args=(ended,)) for _ in range(args.one)]
    for thread in solving:
        thread.start()
    time.sleep(0.5)
    torch.set_num_threads(n_threads)  # those of `solve` became the default
    found: dict[str, list[float]] = {way: [] for way in ways(torch.cuda.is_available())}
    for _ in range(args.repeats):
        for way, copied in ways(torch.cuda.is_available()).items():
            time.sleep(0.02)  # the rest of a step
            began = time.perf_counter()
            copied(tokens[:, :-1])
            found[way].append(1000 * (time.perf_counter() - began))
    ended.set()
    for thread in solving:
        thread.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512, help="sequences")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2], help="that solve")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(measure(args)))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads of torch")
    for spins in (None, SPINS):
        for n_solving in args.threads:
            command = [sys.executable, __file__, *sys.argv[1:], f"--one={n_solving}"]
            environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
            if spins is not None:
                environment["GOMP_SPINCOUNT"] = spins
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            for way, ms in json.loads(done.stdout).items():
                print(
                    f"spins {spins or 'as by default'}, {n_solving} threads solve: {way:5} "
                    f"{statistics.mean(ms):.2f} ms (worst {max(ms):.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
