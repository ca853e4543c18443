"""The spectral regularizer in two processes: each process has the term of its own micro-batch."""

from pathlib import Path

import torch
import torch.distributed as dist
from processes import together
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nerve.models import Penalty, Regularizer
from nerve.models.gpt import GPT, GPTConfig

CONFIG = GPTConfig(n_layers=2, d_model=8, n_heads=2, seq_len=6, vocab_size=11, init_std=0.3)
WEIGHT = Regularizer("participation_ratio", weight=0.5, n_tokens=40)


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG).double()


def tokens(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(CONFIG.vocab_size, (20, CONFIG.seq_len), generator=generator)


def gradients(model: torch.nn.Module, penalty: Penalty, inputs: Tensor) -> list[Tensor]:
    penalty.start()
    logits = model(inputs)
    (logits.square().mean() + penalty.finish()).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def in_processes(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = make_model()
    penalty = Penalty(model, WEIGHT)
    found = gradients(DistributedDataParallel(model), penalty, tokens(rank))
    torch.save(found, Path(directory) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_the_gradient_of_two_processes_is_the_mean_of_those_of_their_own_batches(tmp_path):
    """Not that of both batches together, because log PR of all tokens is another number."""
    together(in_processes, 2, tmp_path)
    expected = []
    for rank in (0, 1):
        model = make_model()
        expected.append(gradients(model, Penalty(model, WEIGHT), tokens(rank)))
    means = [(a + b) / 2 for a, b in zip(*expected, strict=True)]
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), means)
    model = make_model()
    both = gradients(model, Penalty(model, WEIGHT), torch.cat([tokens(0), tokens(1)]))
    assert max(float((a - b).abs().max()) for a, b in zip(both, means, strict=True)) > 1e-6
