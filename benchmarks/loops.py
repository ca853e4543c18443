"""What measuring adds to each loop: a plain one that is watched, Lightning's, and the Trainer's.

One small GPT-2 of transformers on the CPU, the same batches and steps. Each loop runs with and
without measuring in turns, so that what else the machine does falls on both; the figures are the
seconds of a step of each kind, and their ratio, in the median over the turns and at worst. CPU time
of the process, as other programs may hold the cores: `--wall` for the wall's.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainingArguments

import nerve


def model_of(options: argparse.Namespace) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": options.d_model, "n_layer": options.n_layers, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=512, bos_token_id=0, eos_token_id=0))


def batches_of(options: argparse.Namespace) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (options.steps, options.batch, options.seq_len)
    return [
        {"input_ids": each, "labels": each}
        for each in torch.randint(1, 512, shape, generator=generator)
    ]


def plain(options: argparse.Namespace, folder: Path, is_measured: bool) -> None:
    model = model_of(options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watched: AbstractContextManager[Any] = nullcontext()
    if is_measured:
        watched = nerve.watch(model, folder / "run", every_n_steps=options.every)
    with watched as run:
        for batch in batches_of(options):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if run is not None:
                run.step(loss, batch["labels"].numel())


class Module(L.LightningModule):
    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        self.model = model_of(options)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def lightning(options: argparse.Namespace, folder: Path, is_measured: bool) -> None:
    callbacks: list[L.Callback] = []
    if is_measured:
        asked = {"every_n_steps": options.every, "source": "train"}
        callbacks = [nerve.SpectralMonitor(folder, **asked)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(options), Batches(batches_of(options)))


class Batches(tuple[Any, ...]):
    """One loader; Lightning takes a list for several."""


def hugging_face(options: argparse.Namespace, folder: Path, is_measured: bool) -> None:
    rows = [
        {key: value[i] for key, value in batch.items()}
        for batch in batches_of(options)
        for i in range(options.batch)
    ]
    callbacks = []
    if is_measured:
        callbacks = [nerve.SpectralCallback(folder / "run", every_n_steps=options.every)]
    arguments = TrainingArguments(
        str(folder / "trainer"),
        per_device_train_batch_size=options.batch,
        max_steps=options.steps,
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model_of(options), arguments, train_dataset=rows, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


Loop = Callable[[argparse.Namespace, Path, bool], None]
LOOPS: dict[str, Loop] = {"plain": plain, "Lightning": lightning, "Trainer": hugging_face}


def seconds(loop: Loop, options: argparse.Namespace, is_measured: bool) -> float:
    """Of a step, in a run of its own."""
    clock = time.perf_counter if options.wall else time.process_time
    with tempfile.TemporaryDirectory() as folder:
        began = clock()
        loop(options, Path(folder), is_measured)
        return (clock() - began) / options.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between two measurements")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--n-layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--wall", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{options.steps} steps, measured every {options.every}, {options.turns} turns")
    for name, loop in LOOPS.items():
        seconds(loop, options, True)  # imports and first calls
        pairs = [
            (seconds(loop, options, False), seconds(loop, options, True))
            for _ in range(options.turns)
        ]
        without, with_it = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = [measured / alone for alone, measured in pairs]
        print(
            f"{name:10} {1e3 * without:7.2f} ms → {1e3 * with_it:7.2f} ms, "
            f"ratio {statistics.median(ratios):.3f}, worst {max(ratios):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
