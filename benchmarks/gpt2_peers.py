"""GPT-2 of transformers, by hand and under its Trainer: what graphs.py holds nerve against with
`--peers`. Its number of parameters is that of nerve's model; GELU, no dropout, no cache."""

import tempfile
from typing import Any

import gpt_loops
import numpy as np
import torch
from gpt_loops import ADAMW, WARMUP, Clock, Size, Windows, make_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


def gpt2(size: Size) -> GPT2LMHeadModel:
    """Raises:
    ValueError: if it has more or fewer parameters than nerve's model.
    """
    config = GPT2Config(
        vocab_size=size.vocab,
        n_positions=size.seq_len,
        n_embd=size.d_model,
        n_layer=size.layers,
        n_head=size.n_heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    n, expected = (sum(p.numel() for p in m.parameters()) for m in (model, make_model(size)))
    if n != expected:
        raise ValueError(f"GPT-2 of transformers has {n:,} parameters, nerve's {expected:,}")
    return model


class Logits(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


def by_hand(size: Size, device: str) -> Clock:
    """The loop of gpt_loops.py."""
    return gpt_loops.by_hand(size, device, "default", Logits(gpt2(size)))


class Rows(Dataset[dict[str, Tensor]]):
    """The windows as the Trainer takes them, a batch at once: its model shifts the labels."""

    def __init__(self, size: Size) -> None:
        self._windows, self._n = Windows(size), size.steps * size.batch

    def __len__(self) -> int:
        return self._n

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        tokens, _ = self._windows.fetch(np.array(indices) % len(self._windows))
        labels = tokens.clone()
        labels[:, 0] = -100  # nothing predicts it, and it does not count in the mean
        return {"input_ids": tokens, "labels": labels}


class KeepingLosses(Trainer):
    """The Trainer, which keeps the loss of its last step."""

    loss: Tensor

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.loss = super().training_step(*args, **kwargs)
        return self.loss


class Marks(TrainerCallback):
    """Marks the end of each step."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.trainer: KeepingLosses

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._clock.mark(self.trainer.loss)


def under_trainer(size: Size, device: str) -> Clock:
    """The Trainer, compiled, without measuring or checkpoints; what makes it wait for the device at
    every step is off."""
    clock = Clock(device)
    marks = Marks(clock)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=size.batch,
            max_steps=size.steps,
            bf16=True,
            torch_compile=True,
            optim="adamw_torch_fused",
            learning_rate=ADAMW["lr"],
            adam_beta1=ADAMW["betas"][0],
            adam_beta2=ADAMW["betas"][1],
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=round(WARMUP * size.steps),
            max_grad_norm=1.0,
            logging_steps=10,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            accelerator_config={"non_blocking": True},
            use_cpu=device == "cpu",
        )
        trainer = KeepingLosses(
            gpt2(size),
            arguments,
            data_collator=lambda batch: batch,
            train_dataset=Rows(size),
            callbacks=[marks],
        )
        trainer.remove_callback(PrinterCallback)
        marks.trainer = trainer
        trainer.train()
    return clock
