"""What measuring costs a GPT-2 125M in training: stall, overhead, memory, and the other ways.

Every figure comes from one process: plain loops over a compiled GPT-2 written by hand and over the
model of nerve, Lightning without the monitor, with it installed, and with it measuring the training
batch, and one measurement as it is taken without nerve (other_ways.py says how).
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import other_ways

from nerve.data.batches import Batch, BatchDataModule, BatchLoader, HeldOutBatches, ShuffledOrder
from nerve.models import build_model
from nerve.optim import Part, Schedule, build_optimizer
from nerve.storage.store import RunStore
from nerve.training.module import LanguageModel
from nerve.training.monitor import FitMonitor

VOCAB = 50304


def random_batch(batch: int, seq_len: int) -> Batch:
    """Inputs and targets on the host."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (batch, seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Tokens(BatchDataModule):
    """The same random tokens in each batch, which come from the host as in every run of nerve."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(batch_size=args.batch * args.devices, n_train_batches=args.steps, seed=0)
        self._batch = random_batch(args.batch, args.seq_len)

    def fetch(self, indices: np.ndarray) -> Batch:
        """As many sequences as there are indices."""
        inputs, targets = self._batch
        return inputs[: len(indices)], targets[: len(indices)]

    def train_dataloader(self) -> BatchLoader[Batch]:
        return self._train_loader(self.fetch, ShuffledOrder(self.batch_size, self.batch_size, 0))

    def val_dataloader(self) -> HeldOutBatches[Batch]:
        return self._heldout_batches(self.fetch, 8)


class Clock(L.Callback):
    """Marks the end of every training step on the device's own time line."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        self._began = time.perf_counter()
        self.host: list[tuple[float, float]] = []
        """Of each mark: the time of day, and the CPU seconds of the thread that trains."""
        self.first_s = 0.0
        """Seconds from here to the end of the second step, by which all graphs are compiled."""

    def on_train_batch_end(self, *args: object) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
        self.host.append((time.time(), time.thread_time()))
        if len(self._events) == 2:
            event.synchronize()
            self.first_s = time.perf_counter() - self._began

    def milliseconds(self) -> list[float]:
        """Of each step from the second on."""
        torch.cuda.synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [before.elapsed_time(after) for before, after in pairs]


def rank() -> int:
    """Of this process among those that Lightning starts, one a GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def make_model(args: argparse.Namespace) -> nn.Module:
    values = {
        "model": {
            "kind": "gpt",
            "n_layers": args.layers,
            "d_model": args.d_model,
            "n_heads": args.d_model // 64,
            "seq_len": args.seq_len,
        },
        "normalization": {},
        "activation": {"name": "gelu"},
        "position": {"name": "learned"},
        "ffn": {"width": 4},
    }
    return build_model(values, seed=0, vocab_size=VOCAB).to(args.device)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    roles = ("hidden", "embedding", "head", "vector")
    build = partial(torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.95), fused=True)
    return build_optimizer(model, {"main": Part(roles, build)})


def plain_loop(args: argparse.Namespace, model: nn.Module) -> list[float]:
    """The same optimizer, precision and clipping without Lightning; ms of each step."""
    clock = Clock()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    @torch.compile
    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

    inputs, targets = (each.to(args.device) for each in random_batch(args.batch, args.seq_len))
    for _ in range(args.steps):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = loss_of(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        clock.on_train_batch_end()
    return clock.milliseconds()


class PlainGPT2(nn.Module):
    """GPT-2 as one writes it without any factor to choose: what the speed is held against."""

    def __init__(self, d_model: int, n_layers: int, seq_len: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, d_model)
        self.positions = nn.Embedding(seq_len, d_model)
        self.blocks = nn.ModuleList(PlainBlock(d_model) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, VOCAB, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PlainBlock(nn.Module):
    """Causal attention with heads of 64, then the FFN."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.before_attention, self.before_ffn = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.before_attention(x)).unflatten(-1, (3, -1, 64)).transpose(1, 3)
        q, k, v = heads.unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_ffn(x))))


class Run(NamedTuple):
    """What a run took: ms of each step from the second on, bytes of the device at most,
    `Clock.first_s`, and `Clock.host`."""

    times: list[float]
    peak: int
    first_s: float
    host: list[tuple[float, float]]


def lightning_run(args: argparse.Namespace, every_n_steps: int | None) -> Run:
    """Lightning, with the monitor if given a cadence."""
    clock = Clock()
    schedule = Schedule("constant", cooldown=0.0)
    module = LanguageModel(make_model(args), optimizer_of, schedule, compile=True)
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as directory:
        callbacks: list[L.Callback] = [clock]
        if every_n_steps is not None:
            store = RunStore(directory, "run") if rank() == 0 else None
            callbacks[:0] = [
                FitMonitor(store, every_n_steps=every_n_steps, source="train", spectra=False)
            ]
        trainer = L.Trainer(
            accelerator="gpu",
            devices=args.devices,
            strategy="ddp" if args.devices > 1 else "auto",
            use_distributed_sampler=False,
            precision="bf16-mixed",
            max_steps=args.steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            callbacks=callbacks,
            limit_val_batches=1 if len(callbacks) > 1 else 0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=Tokens(args))
    times, peak = clock.milliseconds(), torch.cuda.max_memory_allocated()
    return Run(times, peak, clock.first_s, clock.host)


def stalls(times: list[float], every: int, typical: float) -> list[tuple[float, float]]:
    """For each measurement, the ms by which the steps up to the next one exceed typical ones, and
    what of that the later half of them has, far from a measurement.

    Each step counts only where it takes more than 4 times the spread of typical steps.
    """
    spread = statistics.median(abs(t - typical) for t in times)
    excess = [t - typical if abs(t - typical) > 4 * spread else 0.0 for t in times]
    starts = range(every - 2, len(times) - every + 2, every)  # times[i] is that of step i + 1
    windows = [excess[start : start + every - 2] for start in starts]
    return [(sum(window), sum(window[len(window) // 2 :])) for window in windows]


def compare_loops(args: argparse.Namespace) -> None:
    """Plain loops, and what Lightning and a monitor that does not measure add to them."""
    by_hand = PlainGPT2(args.d_model, args.layers, args.seq_len).to(args.device)
    hand = statistics.median(plain_loop(args, by_hand)[20:])
    del by_hand
    print(f"plain loop, GPT-2 written by hand: {hand:8.1f} ms per step", flush=True)
    plain = statistics.median(plain_loop(args, make_model(args))[20:])
    print(f"plain loop, the model of nerve:    {plain:8.1f} ms per step", flush=True)
    bare = statistics.median(lightning_run(args, None).times[20:])
    print(f"Lightning without the monitor:     {bare:8.1f} ms per step", flush=True)
    idle = statistics.median(lightning_run(args, 10**9).times[20:])
    print(
        f"Lightning, monitor not measuring:  {idle:8.1f} ms per step: {bare / idle:.3f} of the "
        f"speed without it, {plain / idle:.3f} of the plain loop's, {hand / idle:.3f} of the "
        f"other's"
    )


def measure_stall(
    args: argparse.Namespace,
) -> tuple[list[str], float, list[tuple[float, float]]]:
    """What measuring adds to training: lines to print, ms of a step between measurements, and of
    the stall of each, as `stalls` gives it."""
    bare_peak = lightning_run(args, None).peak
    times, peak, *_ = lightning_run(args, args.every)
    typical = statistics.median(times[20:])
    found = stalls(times, args.every, typical)
    all_stalls = [whole for whole, _ in found]
    stall, worst = statistics.mean(all_stalls), max(all_stalls)
    each = ", ".join(f"{ms:.0f}" for ms in all_stalls)
    later = ", ".join(f"{ms:.0f}" for _, ms in found)
    around = [round(t) for t in times[args.every - 5 : args.every + 25]]
    gib = 2**30
    lines = [
        f"Lightning, every {args.every} steps:         {typical:8.1f} ms per step between",
        f"stall of a measurement, mean:      {stall:8.1f} ms ({stall / typical:.2f} steps); {each}",
        f"                        worst:     {worst:8.1f} ms ({worst / typical:.2f} steps)",
        f"    of it far from a measurement, ms: {later}",
        f"overhead at every 100 steps:       {stall / typical / 100:8.2%}",
        f"overhead at every 1000 steps:      {stall / typical / 1000:8.3%}",
        f"device memory: {bare_peak / gib:.1f} GiB without the monitor, {peak / gib:.1f} with it "
        f"({peak / bare_peak - 1:+.1%})",
        f"steps around the measurement, ms: {around}",
    ]
    return lines, typical, found


def write(
    path: Path, started: datetime, step_ms: float, stalls_ms: list[tuple[float, float]]
) -> None:
    """The result as the study reads it."""
    result = {
        "started": started.isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "step_ms": step_ms,
        "stall_ms": [whole for whole, _ in stalls_ms],
        "between_ms": [later for _, later in stalls_ms],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=512, help="sequences per step and GPU")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=330)
    parser.add_argument("--every", type=int, default=100, help="steps between measurements")
    parser.add_argument("--devices", type=int, default=1, help="GPUs; of several, the stall alone")
    parser.add_argument("--sites", type=int, default=1, help="to take in slow other ways")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the stalls as JSON")
    args = parser.parse_args()
    started = datetime.now(UTC)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO if rank() == 0 else logging.WARNING)
    torch.set_float32_matmul_precision("high")
    torch.cuda.set_device(rank())
    if rank() == 0:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args}", flush=True)
    lines, step_ms, stalls_ms = measure_stall(args)
    if rank() == 0:
        print("\n".join(lines), flush=True)
        if args.write:
            write(args.write, started, step_ms, stalls_ms)
    if args.devices == 1:
        compare_loops(args)
        inputs = random_batch(args.batch, args.seq_len)[0].to(args.device)
        stall_s = statistics.mean(whole for whole, _ in stalls_ms) / 1000
        other_ways.compare(make_model(args), inputs, stall_s, args.sites)


if __name__ == "__main__":
    main()
