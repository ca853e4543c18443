"""Language models of two layers in a Lightning module, for the tests of training."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nerve.models import Regularizer, build_model
from nerve.optim import Part, Schedule, build_optimizer
from nerve.training.module import LanguageModel

SEQ = 8
ADAMW = partial(torch.optim.AdamW, lr=1e-2)


def language_model(
    vocab_size: int,
    schedule: Schedule,
    *,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    compile: bool = False,
    regularizer: Regularizer | None = None,
    **groups: dict[str, Any],
) -> LanguageModel:
    """A model with d_model 16 and d_ff 32; `groups` change values of the configuration."""
    values: dict[str, dict[str, Any]] = {
        "model": {"kind": "gpt", "n_layers": 2, "d_model": 16, "n_heads": 2, "seq_len": SEQ},
        "normalization": {},
        "activation": {"name": "gelu"},
        "position": {"name": "learned"},
        "ffn": {"width": 2},
    }
    for group, changes in groups.items():
        values[group] |= changes
    roles = ("hidden", "embedding", "head", "vector")
    parts = {"main": Part(roles, optimizer)}
    return LanguageModel(
        build_model(values, seed=0, vocab_size=vocab_size),
        lambda model: build_optimizer(model, parts),
        schedule,
        compile=compile,
        regularizer=regularizer or Regularizer(),
    )
