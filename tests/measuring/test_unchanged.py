"""A measurement leaves random states and the state of a model as they were, so that training goes
on as it would have without."""

import random

import numpy as np
import pytest
import torch
from by_hand import Plain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nerve
from nerve.measuring.unchanged import random_states_kept


class Changing(nn.Module):
    """A language model whose forward pass changes something, also in eval mode."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.embedding = nn.Embedding(20, 6)
        self.ffn = Plain(nn.Linear(6, 12), nn.Linear(12, 6))
        self.register_buffer("mean", torch.zeros(6))
        self.memory: Tensor | None = None
        self.n_calls = 0

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        self.n_calls += 1
        if self.what == "torch":  # such as the masks of a diffusion model
            x = x * (torch.rand(len(x), 1, 1) < 0.5)
        if self.what == "numpy":
            x = x * np.random.rand()
        if self.what == "buffer":
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
            x = x - self.mean
        if self.what == "new buffer":
            self.mean = self.mean.lerp(x.detach().mean((0, 1)), 0.1)
            x = x - self.mean
        if self.what == "memory":
            last, self.memory = self.memory, x.detach().mean((0, 1))
            x = x if last is None else x + last
        if self.what == "number":
            x = x / self.n_calls
        return self.ffn(x)


CHANGED = ("torch", "numpy", "buffer", "new buffer", "memory", "number")


def trained(what: str, tmp_path=None, **how: object) -> Tensor:
    """The weights after 5 steps, measured at three of them if there is a directory."""
    torch.manual_seed(0)
    np.random.seed(0)
    model = Changing(what)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = torch.randint(20, (5, 3, 7), generator=torch.Generator().manual_seed(0))

    def loop(run: object = None) -> None:
        for ids in batches:
            model(input_ids=ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if run is not None:
                run.step()

    if tmp_path is None:
        loop()
    else:
        with nerve.watch(model, tmp_path, every_n_steps=2, **how) as run:
            loop(run)
    return nn.utils.parameters_to_vector(model.parameters())


@pytest.mark.parametrize("what", CHANGED)
@pytest.mark.parametrize("source", ["train", "heldout"])
def test_training_is_the_same_bit_by_bit(tmp_path, what, source):
    """Looking for FFNs, for the order of tokens and for the stream, and held-out batches."""
    heldout = [{"input_ids": torch.arange(14).reshape(2, 7)}]
    how = {"heldout": heldout, "sites": ["stream_in"]} if source == "heldout" else {}
    assert torch.equal(trained(what), trained(what, tmp_path, **how))


def test_random_numbers_of_python_are_put_back():
    """By itself: the type checks of the tests draw such numbers in a loop."""
    state = random.getstate()
    with random_states_kept():
        random.random()
    assert random.getstate() == state


def test_a_cache_that_a_pass_creates_is_gone_afterwards():
    class Caching(Changing):
        def forward(self, input_ids: Tensor) -> Tensor:
            if not hasattr(self, "cached"):
                self.cached = torch.full((6,), float(len(input_ids)))
            return self.ffn(self.embedding(input_ids) * self.cached)

    model = Caching("nothing").eval()
    nerve.find_ffns(model, {"input_ids": torch.arange(21).reshape(3, 7) % 20})
    assert not hasattr(model, "cached")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_whole_model_under_activation_checkpointing_is_measured_once(tmp_path, use_reentrant):
    """Its pass runs again in the backward pass, which must not see what the measurement saves for
    derivatives, and whose features must not count twice."""
    torch.manual_seed(0)
    model = Changing("nothing")
    ids = torch.arange(21).reshape(3, 7) % 20
    for parameter in model.embedding.parameters():
        parameter.requires_grad_(False)

    def run_of(anchor: Tensor) -> Tensor:
        return model(input_ids=ids) * anchor

    with nerve.watch(model, tmp_path, every_n_steps=1) as run:
        anchor = torch.ones((), requires_grad=True)
        checkpoint(run_of, anchor, use_reentrant=use_reentrant).sum().backward()
        run.step()
    rows = nerve.load_metrics(tmp_path)
    expected = nerve.measure(model, [ids])
    assert rows["n_samples"].tolist() == [21]
    assert rows["pr_post"].tolist() == pytest.approx(expected["pr_post"].tolist(), rel=1e-6)
