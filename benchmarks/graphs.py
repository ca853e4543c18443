"""What CUDA graphs save a step: loops written by hand and nerve with everything on, both ways.

With everything on: Lightning, the monitor on the training batch at every 100 steps, a store and a
CSV file that get the losses, the progress bar, clipping, a learning rate that changes at every
step, batches from the host. Every size runs in a process of its own, one on each GPU that there is.
The losses of all ways are held against those of the loop by hand without graphs.

With `--peers` the same training (size, batch, precision, optimizer, schedule, clipping) also runs
with what people use without nerve, which measures nothing: GPT-2 of transformers in the compiled
loop by hand, and under transformers' Trainer (torch_compile, logging every 10 steps). It has as
many parameters, which is checked, but other initial weights, and under the Trainer other batches:
its losses lie further apart.
"""

import argparse
import io
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from queue import SimpleQueue

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpt_loops import (
    SCHEDULE,
    SIZES,
    Clock,
    Size,
    Windows,
    by_hand,
    make_model,
    optimizer_of,
    plain_gpt2,
)

from nerve.cores import spin_briefly
from nerve.recording.heartbeat import Heartbeat
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore
from nerve.training import module as training
from nerve.training.callbacks import RunProgressBar, StepNotes
from nerve.training.loggers import CSVLogger, StoreLogger
from nerve.training.module import LanguageModel
from nerve.training.monitor import FitMonitor

AIMS = {"12x512": "must 1.3, aim 1.5", "4x128": "aim 3", "6x192": "aim 3", "125M": "aim .98"}


def nerve(size: Size, device: str, graphs: bool | None) -> Clock:
    """Lightning with everything on; with graphs, without, or as nerve chooses."""
    chosen = training.choose
    if graphs is not None:
        training.choose = lambda *_: graphs
    clock = Clock(device)
    try:
        lightning_module = LanguageModel(make_model(size), optimizer_of, SCHEDULE, compile=True)
        with tempfile.TemporaryDirectory() as directory:
            record = RunRecord.create(Path(directory) / "run", {}, run_id="run")
            store = RunStore(Path(directory) / "run", "run")
            heartbeat = Heartbeat(record)
            trainer = L.Trainer(
                accelerator="gpu" if device == "cuda" else "cpu",
                devices=1,
                precision="bf16-mixed",
                max_steps=size.steps,
                max_epochs=-1,
                gradient_clip_val=1.0,
                log_every_n_steps=10,
                callbacks=[
                    FitMonitor(store, every_n_steps=100, source="train"),
                    StepNotes(heartbeat),
                    RunProgressBar("tokens"),
                    clock,
                ],
                logger=[StoreLogger(store), CSVLogger(directory)],
                enable_checkpointing=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            with heartbeat, redirect_stdout(io.StringIO()):  # the progress bar
                trainer.fit(lightning_module, datamodule=Windows(size))
    finally:
        training.choose = chosen
    return clock


def ways_of(name: str, has_peers: bool) -> dict[str, Callable[[Size, str], Clock]]:
    """Name to loop, that which the others are held against first."""
    ways: dict[str, Callable[[Size, str], Clock]] = {
        "by hand": lambda size, device: by_hand(size, device, "default"),
    }
    if name == "125M":
        ways |= {
            "GPT-2 by hand": lambda size, device: by_hand(
                size, device, "default", plain_gpt2(size)
            ),
            "nerve": lambda size, device: nerve(size, device, None),
        }
    else:
        ways["nerve, graphs"] = lambda size, device: nerve(size, device, True)
    if has_peers:
        import gpt2_peers

        ways |= {
            "transformers by hand": gpt2_peers.by_hand,
            "transformers' Trainer": gpt2_peers.under_trainer,
        }
    if name != "125M":
        ways |= {
            "by hand, graphs": lambda size, device: by_hand(size, device, "reduce-overhead"),
            "nerve, no graphs": lambda size, device: nerve(size, device, False),
        }
    return ways


def one(name: str, device: str, has_peers: bool) -> None:
    """Times all ways of one size, in this process."""
    size, first, losses = SIZES[name], None, None
    print(f"{name}: {size.batch * size.seq_len:,} tokens a step ({AIMS.get(name, '')})", flush=True)
    for way, run in ways_of(name, has_peers).items():
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try:
            clock = run(size, device)
            steps = clock.milliseconds()[30:]
        except Exception:
            print(f"{name}: {way}: FAILED\n{traceback.format_exc()}", flush=True)
            continue
        mean, worst = statistics.mean(steps), max(steps)
        first = mean if first is None else first
        found = clock.losses()
        losses = found if losses is None else losses
        n = min(200, len(found))
        apart = (found - losses)[:n].abs()
        fell = f"from {found[0]:.3f} to {found[-20:].mean():.3f}"
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        print(
            f"{name}: {way:21} {mean:7.2f} ms a step (median {statistics.median(steps):.2f}, worst "
            f"{worst:.1f}), {first / mean:.2f} times by hand; losses of {n} steps apart by "
            f"{apart.mean():.1e}, at most {apart.max():.1e}, {fell} (last 20); peak "
            f"{peak:.1f} GiB; {time.perf_counter() - began:.0f} s, passes without graphs {skips}",
            flush=True,
        )


def visible() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [each.strip() for each in named.split(",") if each.strip()]


def run_each(names: list[str], device: str, has_peers: bool) -> None:
    """Runs each size in a process of its own, as many at once as there are GPUs."""
    gpus: SimpleQueue[str] = SimpleQueue()
    devices = visible() if device == "cuda" else [""]
    for gpu in devices:
        gpus.put(gpu)

    def run(name: str) -> None:
        gpu = gpus.get()
        command = [sys.executable, __file__, "--one", name, "--device", device]
        command += ["--peers"] * has_peers
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        gpus.put(gpu)
        if done.returncode:
            print(f"{name}: FAILED\n{done.stderr[-4000:]}", flush=True)

    with ThreadPoolExecutor(len(devices)) as pool:
        list(pool.map(run, names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["12x512", "4x128", "6x192", "125M"]
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=names)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--peers", action="store_true", help="also train GPT-2 of transformers")
    parser.add_argument("--one", choices=SIZES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        warnings.filterwarnings("ignore")
        logging.basicConfig(
            level=logging.WARNING, stream=sys.stdout, format=f"{args.one}: %(message)s"
        )
        logging.getLogger("nerve.training.graphs").setLevel(logging.INFO)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        torch.set_float32_matmul_precision("high")
        one(args.one, args.device, args.peers)
        sys.stdout.flush()
        os._exit(0)  # what is still being solved is not waited for
    spin_briefly()  # in the processes that train, as nerve-run does
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    run_each(args.sizes, args.device, args.peers)


if __name__ == "__main__":
    main()
