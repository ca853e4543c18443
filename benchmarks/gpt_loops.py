"""What graphs.py, optimizers.py and priority.py train and time: GPTs on skewed random tokens, the
clock of their steps, and the loop as one writes it by hand."""

import time
from functools import partial
from typing import NamedTuple

import lightning as L
import monitor
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nerve.data.batches import Batch, BatchDataModule, BatchLoader, HeldOutBatches, ShuffledOrder
from nerve.models import build_model
from nerve.optim import Part, Schedule, build_optimizer

WARMUP = 0.05
SCHEDULE = Schedule("cosine", warmup=WARMUP)
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "fused": True}


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


class Windows(BatchDataModule):
    """Batches of windows of skewed random tokens, which a model can learn the frequencies of."""

    def __init__(self, size: Size) -> None:
        super().__init__(batch_size=size.batch, n_train_batches=size.steps, seed=0)
        rng = np.random.default_rng(0)
        self._size = size
        self._tokens = np.minimum(rng.zipf(1.3, 1_000_000), size.vocab) - 1

    def __len__(self) -> int:
        return len(self._tokens) // self._size.seq_len - 1

    def fetch(self, indices: np.ndarray) -> Batch:
        """The inputs and targets of some windows."""
        length = self._size.seq_len
        windows = self._tokens[indices[:, None] * length + np.arange(length + 1)]
        tokens = torch.from_numpy(windows)
        return tokens[:, :-1], tokens[:, 1:]

    def train_dataloader(self) -> BatchLoader[Batch]:
        return self._train_loader(self.fetch, ShuffledOrder(len(self), self._size.batch, 0))

    def val_dataloader(self) -> HeldOutBatches[Batch]:
        return self._heldout_batches(self.fetch, 8)


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


def plain_gpt2(size: Size) -> nn.Module:
    """A GPT-2 without factors, as one writes it."""
    return monitor.PlainGPT2(size.d_model, size.layers, size.seq_len)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, for a model of nerve without weight decay of its vectors."""
    roles = ("hidden", "embedding", "head", "vector")
    return build_optimizer(model, {"main": Part(roles, partial(torch.optim.AdamW, **ADAMW))})


def one_group(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW for all parameters alike."""
    return torch.optim.AdamW(model.parameters(), **ADAMW)


class Trained:
    """A model with its compiled loss under bfloat16 autocast, and one step of training it."""

    def __init__(self, model: nn.Module, device: str, mode: str) -> None:
        self.model, self._device = model.to(device), device

        def losses(inputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())

        self._losses = torch.compile(losses, mode=mode)

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
        """Trains on a batch, which may be on the host; its loss."""
        inputs, targets = (moved(each, self._device) for each in batch)
        with torch.autocast(self._device, dtype=torch.bfloat16):
            loss: Tensor = self._losses(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        return loss


def moved(tensor: Tensor, device: str) -> Tensor:
    if device == "cpu" or tensor.is_cuda:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def by_hand(size: Size, device: str, mode: str, model: nn.Module | None = None) -> Clock:
    """A loop as one writes it, over the model of nerve or another one."""
    trained = Trained(make_model(size) if model is None else model, device, mode)
    optimizer = optimizer_of(trained.model) if model is None else one_group(trained.model)
    scheduler, clock = SCHEDULE.scheduler(optimizer, size.steps), Clock(device)
    for batch in Windows(size).train_dataloader():
        loss = trained.step(optimizer, batch)
        scheduler.step()
        clock.mark(loss)
    return clock
