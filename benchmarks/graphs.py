"""What CUDA graphs save a step: loops written by hand and nerve with everything on, both ways.

With everything on: Lightning, the monitor on the training batch at every 100 steps, a store and a
CSV file that get the losses, the progress bar, clipping, a learning rate that changes at every
step, batches from the host. Every size runs in a process of its own, one on each GPU that there is.
The losses of all ways are held against those of the loop by hand without graphs.
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
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import monitor

from nerve.data.batches import Batch, BatchDataModule, BatchLoader, HeldOutBatches, ShuffledOrder
from nerve.models import build_model
from nerve.optim import Part, Schedule, build_optimizer
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore
from nerve.training import module as training
from nerve.training.callbacks import Heartbeat, RunProgressBar
from nerve.training.loggers import CSVLogger, StoreLogger
from nerve.training.module import LanguageModel
from nerve.training.monitor import SpectralMonitor

SCHEDULE = Schedule("cosine", warmup=0.05)


class Size(NamedTuple):
    layers: int
    d_model: int
    n_heads: int
    batch: int
    seq_len: int
    vocab: int
    steps: int


SIZES = {
    "12x512": Size(12, 512, 8, 128, 128, 1024, 230),
    "4x128": Size(4, 128, 2, 16, 128, 1024, 330),
    "6x192": Size(6, 192, 3, 32, 128, 1024, 330),
    "125M": Size(12, 768, 12, 512, 128, monitor.VOCAB, 130),
    "tiny": Size(2, 16, 2, 4, 8, 64, 110),
}
AIMS = {"12x512": "must 1.3, aim 1.5", "4x128": "aim 3", "6x192": "aim 3", "125M": "aim .98"}


class Windows(BatchDataModule):
    """Batches of windows of skewed random tokens, which a model can learn the frequencies of."""

    def __init__(self, size: Size) -> None:
        super().__init__(batch_size=size.batch, n_train_batches=size.steps, seed=0)
        rng = np.random.default_rng(0)
        self._size = size
        self._tokens = np.minimum(rng.zipf(1.3, 1_000_000), size.vocab) - 1

    def _fetch(self, indices: np.ndarray) -> Batch:
        length = self._size.seq_len
        windows = self._tokens[indices[:, None] * length + np.arange(length + 1)]
        tokens = torch.from_numpy(windows)
        return tokens[:, :-1], tokens[:, 1:]

    def _order(self) -> ShuffledOrder:
        return ShuffledOrder(len(self._tokens) // self._size.seq_len - 1, self._size.batch, 0)

    def train_dataloader(self) -> BatchLoader[Batch]:
        return self._train_loader(self._fetch, self._order())

    def val_dataloader(self) -> HeldOutBatches[Batch]:
        return self._heldout_batches(self._fetch, 8)


class Clock(L.Callback):
    """The end of each step on the device's time line, and its loss."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._ends: list = []
        self._losses: list[Tensor] = []

    def mark(self, loss: Tensor) -> None:
        self._losses.append(loss.detach().clone())
        if self._on_gpu:
            self._ends.append(torch.cuda.Event(enable_timing=True))
            self._ends[-1].record()
        else:
            self._ends.append(time.perf_counter())

    def on_train_batch_end(
        self, trainer: object, module: object, outputs: dict, *_: object
    ) -> None:
        self.mark(outputs["loss"])

    def milliseconds(self) -> list[float]:
        pairs = list(zip(self._ends, self._ends[1:], strict=False))
        if self._on_gpu:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) for before, after in pairs]
        return [1000 * (after - before) for before, after in pairs]

    def losses(self) -> Tensor:
        return torch.stack(self._losses).float().cpu()


def make_model(size: Size, constraint: str = "none") -> nn.Module:
    shape = {
        "kind": "gpt",
        "n_layers": size.layers,
        "d_model": size.d_model,
        "n_heads": size.n_heads,
        "seq_len": size.seq_len,
    }
    factors = {"activation": {"name": "gelu"}, "position": {"name": "learned"}}
    ffn = {"width": 4, "constraint": constraint}
    values = {"model": shape, "normalization": {}, "ffn": ffn, **factors}
    return build_model(values, seed=0, vocab_size=size.vocab)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    roles = ("hidden", "embedding", "head", "vector")
    build = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), fused=True)
    return build_optimizer(model, {"main": Part(roles, build)})


def by_hand(size: Size, device: str, mode: str, plain: bool = False) -> Clock:
    """A loop as one writes it; `plain` for a GPT-2 without factors."""
    if plain:
        model: nn.Module = monitor.PlainGPT2(size.d_model, size.layers, size.seq_len).to(device)
    else:
        model = make_model(size).to(device)
    optimizer, clock = optimizer_of_plain(model) if plain else optimizer_of(model), Clock(device)
    scheduler = SCHEDULE.scheduler(optimizer, size.steps)

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    compiled = torch.compile(losses, mode=mode)
    for batch in Windows(size).train_dataloader():
        inputs, targets = (moved(each, device) for each in batch)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = compiled(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        clock.mark(loss)
    return clock


def optimizer_of_plain(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)


def moved(tensor: Tensor, device: str) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor


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
            trainer = L.Trainer(
                accelerator="gpu" if device == "cuda" else "cpu",
                devices=1,
                precision="bf16-mixed",
                max_steps=size.steps,
                max_epochs=-1,
                gradient_clip_val=1.0,
                log_every_n_steps=10,
                callbacks=[
                    SpectralMonitor(store, every_n_steps=100, source="train"),
                    Heartbeat(record),
                    RunProgressBar("tokens"),
                    clock,
                ],
                logger=[StoreLogger(store), CSVLogger(directory)],
                enable_checkpointing=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            with redirect_stdout(io.StringIO()):  # the progress bar
                trainer.fit(lightning_module, datamodule=Windows(size))
    finally:
        training.choose = chosen
    return clock


def ways_of(name: str) -> dict[str, Callable[[Size, str], Clock]]:
    """Name to loop, that which the others are held against first."""
    ways: dict[str, Callable[[Size, str], Clock]] = {
        "by hand": lambda size, device: by_hand(size, device, "default"),
    }
    if name == "125M":
        plain = partial(by_hand, mode="default", plain=True)
        return ways | {
            "GPT-2 by hand": plain,
            "nerve": lambda size, device: nerve(size, device, None),
        }
    return ways | {
        "nerve, graphs": lambda size, device: nerve(size, device, True),
        "by hand, graphs": lambda size, device: by_hand(size, device, "reduce-overhead"),
        "nerve, no graphs": lambda size, device: nerve(size, device, False),
    }


def one(name: str, device: str) -> None:
    """Times all ways of one size, in this process."""
    size, first, losses = SIZES[name], None, None
    print(f"{name}: {size.batch * size.seq_len:,} tokens a step ({AIMS.get(name, '')})", flush=True)
    for way, run in ways_of(name).items():
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
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        print(
            f"{name}: {way:16} {mean:7.2f} ms a step (median {statistics.median(steps):.2f}, worst "
            f"{worst:.1f}), {first / mean:.2f} times by hand; losses of {n} steps apart by "
            f"{apart.mean():.1e}, at most {apart.max():.1e}, last {found[-1]:.4f}; peak "
            f"{peak:.1f} GiB; {time.perf_counter() - began:.0f} s, passes without graphs {skips}",
            flush=True,
        )


def visible() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [each.strip() for each in named.split(",") if each.strip()]


def run_each(names: list[str], device: str) -> None:
    """Runs each size in a process of its own, as many at once as there are GPUs."""
    gpus: SimpleQueue[str] = SimpleQueue()
    devices = visible() if device == "cuda" else [""]
    for gpu in devices:
        gpus.put(gpu)

    def run(name: str) -> None:
        gpu = gpus.get()
        command = [sys.executable, __file__, "--one", name, "--device", device]
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
        one(args.one, args.device)
        sys.stdout.flush()
        os._exit(0)  # what is still being solved is not waited for
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    run_each(args.sizes, args.device)


if __name__ == "__main__":
    main()
