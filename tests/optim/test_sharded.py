"""With parameters sharded over processes, an optimizer trains the same network as on one device."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from support import composed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F

from nerve.cli.config.compose import resolved
from nerve.cli.experiment.group_plans import parts_of
from nerve.models import build_model
from nerve.optim import build_optimizer

OPTIMIZERS = ("adamw", "sgd")
TINY = ["model.n_layers=2", "model.d_model=16", "model.n_heads=2", "model.seq_len=16"]
STEPS = 6


def curve(values: dict[str, Any], rank: int, n: int, shard: Any) -> list[float]:
    """The loss of each step over all processes, each of which takes its part of every batch."""
    torch.set_default_dtype(torch.float64)
    model = build_model(values, seed=0, vocab_size=50).double()
    sharded = shard(model) or model
    optimizer = build_optimizer(model, parts_of(values["optimizer"], model))
    tokens = torch.randint(50, (STEPS, 4, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    for batch in tokens:
        mine = batch.chunk(n)[rank]
        logits = sharded(mine[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if n > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / n)
    return losses


def values_of(optimizer: str) -> dict[str, Any]:
    """Uses a large weight decay, whose omission would show in the second step."""
    return resolved(
        composed(
            "logger=none",
            *TINY,
            f"optimizer={optimizer}",
            "optimizer.parts.main.build.weight_decay=0.5",
        )
    )


def train_sharded(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    older = partial(FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True)
    for name in OPTIMIZERS:
        values = values_of(name)
        for generation, shard in (("older", older), ("newer", lambda m: fully_shard(m) and None)):
            losses = curve(values, rank, 2, shard)
            Path(folder, f"{name}-{generation}-{rank}").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # FSDP keeps gloo's threads, with which an interpreter may abort at its end


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    together(train_sharded, 2, folder)
    return folder


@pytest.mark.parametrize("generation", ["older", "newer"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_curve_of_shards_is_that_of_one_device(sharded, name, generation):
    default = torch.get_default_dtype()
    try:
        one = curve(values_of(name), 0, 1, lambda model: None)
    finally:
        torch.set_default_dtype(default)
    assert one[-1] != pytest.approx(one[0], rel=1e-3)  # it learns, or decays
    for rank in range(2):
        losses = json.loads((sharded / f"{name}-{generation}-{rank}").read_text())
        assert losses == pytest.approx(one, rel=1e-10)
