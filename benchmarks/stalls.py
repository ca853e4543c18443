"""For how long each measurement stalls training, from the first one on, in fresh processes.

Each process trains a compiled GPT-2 125M of random tokens under Lightning (benchmarks/monitor.py's
run) with the monitor measuring the training batch. A stall is what the steps from a measurement to
the next one take beyond as many steps of those in between. That of step 0 falls into the time in
which graphs are compiled: for it the seconds up to the end of the second step are printed. What it
makes (pinned memory, kernels) stays there for the twelve or more that follow.

One more process trains as many steps without the monitor. It shows how long its first two steps
take, and what the same sums over its steps are: that much comes from the machine and from Python.
"""

import argparse
import collections
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import monitor

from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.recording.recorder import Recorder
from nerve.recording.solver import Solver
from nerve.spectra import SampleShares, StreamingCovariance

PARTS: list[tuple[type, str]] = [
    (Probe, "take"),
    (SampleShares, "update"),
    (StreamingCovariance, "update"),
    (Measurement, "finish_forward"),
    (Measurement, "reduce"),
    (Measurement, "eigenproblems"),
    (Solver, "submit"),
    (Recorder, "finish"),
    (Recorder, "end_step"),
    (Recorder, "label"),
]


def timed(owner: type, name: str, marks: list[Any]) -> None:
    """Has each call of a method leave its host ms, and the events of the device around it."""
    inner: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent = 1000 * (time.perf_counter() - began)
            events[1].record()
            marks.append((f"{owner.__name__}.{name}", spent, events))

    setattr(owner, name, wrapper)


def one(args: argparse.Namespace) -> None:
    """A process of its own: trains, and prints what it found as JSON."""
    if args.cores and monitor.rank() == 0:  # the others begin with those of the first
        cores = sorted(os.sched_getaffinity(0))[args.place * args.cores :][: args.cores]
        os.sched_setaffinity(0, cores or os.sched_getaffinity(0))
    marks: list[Any] = []
    for owner, name in PARTS if args.parts else ():
        timed(owner, name, marks)
    collected = watch_collections()
    args.steps = args.every * (args.measurements + 1) - 2
    run = monitor.lightning_run(args, None if args.plain else args.every)
    times = run.times
    first = [t for i, t in enumerate(times) if i % args.every > args.every // 2]
    typical = statistics.median(first)
    # times[i] is that of step i + 1; the measured step of s is the one after it, and validation
    # goes before.
    starts = range(args.every - 1, len(times) - args.every // 2, args.every)
    windows = [range(s - 1, min(s - 1 + args.every, len(times))) for s in starts]
    stalls = [sum(times[i] - typical for i in window) for window in windows]
    worst = windows[stalls.index(max(stalls))]
    host: dict[str, Any] = {}
    if hasattr(torch.cuda, "host_memory_stats"):
        host = torch.cuda.host_memory_stats()
    found: dict[str, Any] = {
        "step_ms": typical,
        "first_s": run.first_s,
        "spread_ms": statistics.median(abs(t - typical) for t in first),
        "stall_ms": stalls,
        "robust_ms": [ms for ms, _ in monitor.stalls(times, args.every, typical)],
        "around_ms": [[round(t) for t in times[s - 2 : s + 4]] for s in starts],
        "slow steps of the worst": [
            slow(run, i, collected) for i in worst if times[i] > 1.1 * typical
        ],
        "peak_gib": run.peak / 2**30,
        "pinned_mb": host.get("allocated_bytes.peak", 0) / 1e6,
        "pinned_blocks": host.get("num_host_alloc", 0),
        "pinning_ms": host.get("host_alloc_time.total", 0) / 1e3,
    }
    calls = args.measurements + 1
    parts: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, spent, events in marks:
        parts[name][0] += spent / calls
        parts[name][1] += events[0].elapsed_time(events[1]) / calls
    found["parts: host ms, device ms of a measurement"] = {
        name: [round(ms, 1) for ms in each] for name, each in parts.items()
    }
    if monitor.rank() == 0:
        print("STALLS " + json.dumps(found), flush=True)
    os._exit(0)  # what is still being solved is not waited for


def watch_collections() -> list[tuple[float, float]]:
    """A list that gets the time of day and the ms of every collection of Python's garbage, during
    which the thread that trains does nothing else."""
    collected: list[tuple[float, float]] = []
    began = 0.0

    def on_collection(phase: str, info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.perf_counter()
        else:
            collected.append((time.time(), 1000 * (time.perf_counter() - began)))

    gc.callbacks.append(on_collection)
    return collected


def slow(run: monitor.Run, i: int, collected: list[tuple[float, float]]) -> dict[str, Any]:
    """What the step took that `run.times[i]` is that of, and when it ended: ms of the device and of
    the host, those in which the thread that trains computed, and those in which it collected
    garbage."""
    (before, cpu_before), (after, cpu_after) = run.host[i : i + 2]
    return {
        "step": i + 1,
        "device": round(run.times[i]),
        "host": round(1000 * (after - before)),
        "cpu": round(1000 * (cpu_after - cpu_before)),
        "garbage": round(sum(ms for when, ms in collected if before <= when <= after)),
        "ended": time.strftime("%H:%M:%S", time.localtime(after)),
    }


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as the environment names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [each.strip() for each in named.split(",") if each.strip()]


def started(args: argparse.Namespace, place: int, *more: str) -> subprocess.Popen[str]:
    """A fresh process on GPUs and cores of its own, of those that this one may use."""
    share = slice(place * args.devices, (place + 1) * args.devices)
    visible = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible_devices()[share])}
    command = [sys.executable, __file__, "--one", f"--place={place}", *more, *sys.argv[1:]]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=visible)


def print_result(who: str, output: str, errors: str) -> list[float]:
    """Prints what a process found; its stalls in steps."""
    lines = [line for line in output.splitlines() if line.startswith("STALLS ")]
    if not lines:
        sys.exit(f"{who} failed: {output[-2000:]} {errors[-4000:]}")
    found = json.loads(lines[0].removeprefix("STALLS "))
    step, stalls = found.pop("step_ms"), found.pop("stall_ms")
    print(f"{who}: a step {step:.1f} ms")
    print(f"  stalls, ms: {', '.join(f'{ms:.0f}' for ms in stalls)}")
    print(f"  mean {statistics.mean(stalls):.0f} ms, worst {max(stalls):.0f}")
    for key, value in found.items():
        print(f"  {key}: {value}")
    for line in errors.splitlines():
        if "spectra of step" in line:
            print(f"  {line}")
    sys.stdout.flush()
    return [ms / step for ms in stalls]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--processes", type=int, default=3, help="as many at once as there are GPUs"
    )
    parser.add_argument("--measurements", type=int, default=12, help="after that of step 0")
    parser.add_argument("--every", type=int, default=60, help="steps between measurements")
    parser.add_argument("--devices", type=int, default=1, help="GPUs of each process")
    parser.add_argument("--parts", action="store_true", help="time the parts, which costs some")
    parser.add_argument("--cores", type=int, default=16, help="of each process; 0 for all")
    parser.add_argument("--place", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    sizes = {"layers": 12, "d_model": 768, "batch": 512, "seq_len": 128}
    for name, size in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    args = parser.parse_args()
    args.device = "cuda"
    if args.one:
        logging.basicConfig(level=logging.INFO)
        torch.set_float32_matmul_precision("high")
        torch.cuda.set_device(monitor.rank())
        one(args)
    n_at_once = max(1, torch.cuda.device_count() // args.devices)
    everything: list[float] = []
    numbers = range(args.processes + 1)  # the last one without the monitor, with warm caches
    for start in numbers[::n_at_once]:
        here = numbers[start : start + n_at_once]
        plain = [["--plain"] if number == args.processes else [] for number in here]
        runs = [started(args, n - start, *more) for n, more in zip(here, plain, strict=True)]
        for number, run in zip(here, runs, strict=True):
            output, errors = run.communicate()
            if number < args.processes:
                everything += print_result(f"process {number}", output, errors)
            else:
                print_result("without the monitor", output, errors)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.devices} GPU(s): of "
        f"{len(everything)} measurements mean {statistics.mean(everything):.2f} steps, worst "
        f"{max(everything):.2f} (must: 1 and 2)"
    )


if __name__ == "__main__":
    main()
