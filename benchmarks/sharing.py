"""What measuring costs runs that share a GPU: ten trials of a sweep at once, as users start them.

`nerve-run -m seed=… hydra.sweeper.n_jobs=10` trains GPTs of 12 layers of 512. First each trains
without measuring, then it measures at every 100 steps; all trials begin either part together. The
tokens/s of all are summed for each part. Printed beside them are two floors: the times that the
same training and solving take at best, when the cores solve all the while and the GPU does the
rest, with the times for one `eigvalsh` given below. One counts the d_ff x d_ff matrices that the
run has to solve with its shortcut: post of each layer and, in 16 bits, pre too, unless
`monitor.shortcut=projected` computes it from the input. The other counts post alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from nerve.cores import allowed
from nerve.storage.record import RunRecord

SETTLED, COMPARED = 20, 10
"""Steps before the first part, in which graphs are compiled; and the first one of it after that."""

DEVICE_S = {2048: 0.025, 3072: 0.055, 4096: 0.1}
HOST_S = {2048: 0.85, 3072: 2.0, 4096: 5.0}
"""Seconds for one float64 `eigvalsh`, of an H200 and of one core beside it."""


class Clock(L.Callback):
    """Times the two parts, which all trials begin together, and ends the process after them.

    Args:
        folder: where trials tell each other of themselves, and leave their times.
        n: how many trials there are.
        plain, first, last: the steps at which the first part begins, and the second one begins and
            ends.
        paced: whether the thread that trains sleeps while the GPU works, as `nerve` has it.
    """

    def __init__(self, folder: str, n: int, plain: int, first: int, last: int, paced: bool) -> None:
        if not paced:
            from nerve.recording.aside import Pace

            Pace.end_step = lambda pace: None
        self._folder, self._n = Path(folder), n
        self._marks = {plain: "plain", first: "measured", last: "end"}
        self._first = first
        self._times: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        import torch

        name = self._marks.get(trainer.global_step)
        if name is None:
            if trainer.global_step > self._first and trainer.global_step % 10 == 0:
                self._note(f"step {trainer.global_step - self._first}")
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self._times["peak"] = float(torch.cuda.max_memory_allocated())
            self._times["reserved"] = float(torch.cuda.max_memory_reserved())
        self._note(f"{name} came")
        _wait_for_spectra(trainer)
        self._note(f"{name} solved")
        if name == "end":
            os._exit(0)
        (self._folder / f"{name}-{os.getpid()}").touch()
        while len(list(self._folder.glob(f"{name}-*"))) < self._n:
            if any(self._folder.glob("failed-*")):
                os._exit(1)  # that one will not come
            time.sleep(0.01)
        self._note(f"{name} began")

    def on_exception(self, *args: Any) -> None:
        (self._folder / f"failed-{os.getpid()}").touch()

    def _note(self, what: str) -> None:
        """Notes that it is so now, where it stays if this process is ended."""
        self._times[what] = time.time()
        self._times[f"cpu: {what}"] = time.process_time()
        self._times[f"trains: {what}"] = time.thread_time()
        path = self._folder / f"times-{os.getpid()}.json"
        path.with_suffix(".new").write_text(json.dumps(self._times))
        path.with_suffix(".new").replace(path)


def _wait_for_spectra(trainer: L.Trainer) -> None:
    from nerve.training.fit import callbacks_of
    from nerve.training.monitor import FitMonitor

    for callback in callbacks_of(trainer):
        if isinstance(callback, FitMonitor):
            callback._recorder.wait()


def command(args: argparse.Namespace, folder: Path, n: int) -> list[str]:
    """A sweep of `n` seeds."""
    plain = SETTLED
    first = plain + COMPARED + args.plain
    last = first + args.every * args.measurements
    steps = [0, *range(first + 5, last, args.every)]
    library = Path(os.__file__).parent
    roots = ",".join(str(library / name) for name in ("asyncio", "email", "unittest", "xml"))
    clock = {"folder": folder, "n": n, "plain": plain, "first": first, "last": last}
    clock["paced"] = args.paced
    return [
        *(sys.executable, "-m", "nerve.cli.run", "-m"),
        f"seed={','.join(map(str, range(n)))}",
        f"hydra.sweeper.n_jobs={n}",
        f"hydra.sweep.dir={folder / 'runs'}",
        f"data.corpus.roots=[{roots}]",
        "data.val_fraction=0.1",
        f"data.batch_size={args.tokens // args.seq_len}",
        f"model.n_layers={args.layers}",
        f"model.d_model={args.d_model}",
        f"model.n_heads={max(1, args.d_model // 64)}",
        f"model.seq_len={args.seq_len}",
        f"ffn.width={args.width}",
        f"compile={str(args.compile).lower()}",
        f"trainer={args.trainer}",
        f"trainer.max_steps={last + 10}",
        "trainer.enable_progress_bar=false",
        "monitor.every_n_steps=null",
        f"monitor.steps={steps}".replace(" ", ""),
        f"monitor.n_tokens={args.n_tokens}",
        "monitor.spectra=false",
        "logger=none",
        "+callbacks.clock._target_=sharing.Clock",
        *(f"+callbacks.clock.{name}={value}" for name, value in clock.items()),
        *args.overrides,
    ]


def swept(args: argparse.Namespace, folder: Path, n: int) -> list[dict[str, float]]:
    """The times of each trial."""
    folder.mkdir()
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    with open(folder / "log", "w") as log:
        sweep = subprocess.Popen(
            command(args, folder, n),
            env=os.environ | {"PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            sweep.wait(args.limit)
        except subprocess.TimeoutExpired:
            sweep.terminate()  # it passes that on to the trials
            time.sleep(2)
            sweep.terminate()
            try:
                sweep.wait(20)
            except subprocess.TimeoutExpired:
                sweep.kill()
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("times-*.json"))]
    if sum("end came" in each for each in found) < n:
        logs = [*folder.glob("log"), *(folder / "runs").glob("*/output.log")]
        print("\n".join(f"{path}\n{path.read_text()[-1500:]}" for path in logs))
    if sum("measured came" in each for each in found) < n:
        sys.exit(f"not all trials came to the second part; they came to: {found}")
    return found


def part(times: list[dict[str, float]], began: str, ended: str) -> list[float]:
    """Seconds that each trial took from one mark to another."""
    return [each[ended] - each[began] for each in times]


def steps_of_all(times: list[dict[str, float]]) -> int:
    """How many steps of the second part all have done, where not all have come to its end."""
    done = [[int(k.split()[1]) for k in each if k.startswith("step ")] for each in times]
    return min(max(each, default=0) for each in done)


def config_of(folder: Path) -> Mapping[str, Any]:
    """Of one of the trials; they differ in their seeds."""
    (path, *_) = (folder / "runs").glob("*/run.json")
    return RunRecord.load(path.parent).config


def logged_placements(folder: Path) -> list[str]:
    """What trials logged of where they solve and how they wait, each once."""
    lines = [
        line.rpartition("] ")[2]
        for path in (folder / "runs").glob("*/output.log")
        for line in path.read_text().splitlines()
        if "spectra of step" in line or "threads that wait" in line or "training waits" in line
    ]
    return sorted(set(lines))


def floor_s(training_s: float, device_s: float, host_s: float, n_cores: int) -> float:
    """The least time for training and solving, if the GPU trains and then solves what the cores,
    which solve from beginning to end, leave to it.

    Args:
        training_s: of the GPU, for training alone.
        device_s, host_s: of the GPU, or of one core, for solving everything.
    """
    return max(training_s, (training_s + device_s) / (1 + device_s * n_cores / host_s))


def matrices_per_layer(config: Mapping[str, Any]) -> int:
    """How many d_ff x d_ff eigenproblems a layer of a trial has: post, and pre unless the shortcut
    computes it from the FFN's input, by default in 32 bits, as an option in 16."""
    shortcut = config["monitor"]["shortcut"]
    is_exact = str(config["trainer"]["precision"]).startswith("32")
    return 1 if shortcut == "projected" or (shortcut and is_exact) else 2


def report(
    args: argparse.Namespace,
    times: list[dict[str, float]],
    n_cores: int,
    config: Mapping[str, Any],
) -> None:
    n, d_ff = len(times), args.d_model * args.width
    n_plain, n_measured, end = COMPARED + args.plain, args.every * args.measurements, "end came"
    if any(end not in each for each in times):
        n_measured = steps_of_all(times)
        end = f"step {n_measured}"
        print(f"CUT OFF: of the second part {n_measured} steps of each trial count")

    def rate(steps: int, seconds: list[float]) -> float:
        return sum(args.tokens * steps / each for each in seconds)

    plain = part(times, "plain began", "measured came")
    without = rate(n_plain, plain)
    alone = args.tokens * n * args.every / without
    print(f"{n} trials, d_ff {d_ff}, {args.tokens} tokens a step, {n_cores} cores")
    print(
        f"  a step of one trial: {1e3 * statistics.mean(plain) / n_plain:.1f} ms without measuring"
    )
    print(f"  without measuring      {without:12,.0f} tokens/s, in {max(plain):.1f} s")
    for name in ("peak", "reserved"):
        if name in times[0]:
            print(
                f"  device memory of a trial, {name}: {max(t[name] for t in times) / 2**30:.2f} GiB"
            )
    if not n_measured:
        return
    with_it = rate(n_measured, part(times, "measured began", end))
    print(f"  every {args.every:4} steps       {with_it:12,.0f} tokens/s, {with_it / without:.3f}")
    for what, began, ended in (
        ("without measuring", "plain began", "measured came"),
        ("with it", "measured began", end),
    ):
        seconds = statistics.mean(part(times, began, ended))
        busy, trains = (
            sum(part(times, f"{of}: {began}", f"{of}: {ended}")) / seconds
            for of in ("cpu", "trains")
        )
        print(f"  cores kept busy {what}: {busy:.1f}, by main threads {trains:.1f}")
    if d_ff in DEVICE_S:
        taken = args.tokens * n * args.every / with_it
        print(f"  {args.every} steps of each: {alone:.1f} s, {taken:.1f} s with measuring")
        for what, per_layer in (
            ("all that this run has to solve", matrices_per_layer(config)),
            ("post alone", 1),
        ):
            count = per_layer * args.layers
            device, host = (n * count * each[d_ff] for each in (DEVICE_S, HOST_S))
            floor = floor_s(alone, device, host, n_cores)
            print(
                f"    {taken / floor:.2f} times the floor of {floor:.1f} s that counts {what}: "
                f"{count} of {d_ff} in each trial, {device:.1f} s of the GPU or {host:.0f} "
                "core-seconds"
            )
    if all("end solved" in each for each in times):
        until_solved = rate(n_measured, part(times, "measured began", "end solved"))
        print(
            f"  until all is solved    {until_solved:12,.0f} tokens/s, {until_solved / without:.3f}"
            f": {max(part(times, 'end came', 'end solved')):.1f} s after the last step"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--width", type=int, default=4, help="d_ff / d_model")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--n-tokens", default="auto", help="held-out tokens of a measurement")
    parser.add_argument(
        "--plain", type=int, default=100, help="steps of the part without measuring"
    )
    parser.add_argument("--every", type=int, default=100, help="steps between measurements")
    parser.add_argument("--measurements", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--paced", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--trainer", default="gpu")
    parser.add_argument("--limit", type=float, default=270.0, help="seconds at most")
    parser.add_argument("overrides", nargs="*", help="further values of nerve-run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        # The token cache and the compiled graphs are there before the trials start.
        began = time.monotonic()
        warm = argparse.Namespace(**{**vars(args), "plain": 0, "every": 10, "measurements": 1})
        swept(warm, Path(directory) / "warm", 1)
        print(f"caches made in {time.monotonic() - began:.0f} s", flush=True)
        args.limit -= time.monotonic() - began
        began = time.monotonic()
        folder = Path(directory) / "trials"
        times = swept(args, folder, args.trials)
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{name}, torch {torch.__version__}; trials took {time.monotonic() - began:.0f} s")
        report(args, times, allowed(), config_of(folder))
        for line in logged_placements(folder):
            print(f"  {line}")


if __name__ == "__main__":
    main()
