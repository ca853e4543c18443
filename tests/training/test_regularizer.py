"""Training with a regularizer: what its term changes, and what remains the plain cross-entropy."""

from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pytest
import torch
from support import Batches
from torch import Tensor
from torch.nn import functional as F

import nerve
from nerve.models import Penalty, Regularizer
from nerve.models.gpt import GPT, GPTConfig
from nerve.optim import Schedule
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore
from nerve.training.loggers import StoreLogger
from nerve.training.module import LanguageModel
from nerve.training.monitor import FitMonitor

VOCAB, SEQ = 13, 8
STRONG = Regularizer("participation_ratio", -0.3)
NONE = Regularizer()


def make_module(regularizer: Regularizer = NONE, compile: bool = False) -> LanguageModel:
    config = GPTConfig(n_layers=2, d_model=16, n_heads=2, seq_len=SEQ, vocab_size=VOCAB)
    return LanguageModel(
        GPT(config, seed=0),
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
        Schedule("constant", warmup=0.2, cooldown=0.0),
        compile=compile,
        regularizer=regularizer,
    )


def batches(n: int, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (n, 4, SEQ + 1), generator=generator)
    return Batches((t[:, :-1], t[:, 1:]) for t in tokens)


def fit(directory: Path, module: LanguageModel, train: Batches, **arguments: Any) -> pd.DataFrame:
    """Trains with a monitor; returns the rows that it stored."""
    store = RunStore(directory, "run")
    RunRecord.create(directory, {}, run_id="run")
    monitor = FitMonitor(store, every_n_steps=arguments.pop("every_n_steps", 1))
    callbacks = [monitor, *arguments.pop("callbacks", ())]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=len(train) // arguments.get("accumulate_grad_batches", 1),
        max_epochs=-1,
        callbacks=callbacks,
        logger=StoreLogger(store),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(module, train, batches(2, seed=1))
    store.flush(trainer.global_step)
    return nerve.load_metrics(directory)


def cross_entropy(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def by_hand(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Cross-entropy, term, and the gradient of their sum for the initial weights."""
    model = make_module().model
    penalty = Penalty(model, STRONG)
    penalty.start()
    loss = cross_entropy(model, batch)
    term = penalty.finish()
    parameters = [each for each in model.parameters() if each.requires_grad]
    return loss, term, list(torch.autograd.grad(loss + term, parameters))


def test_a_step_has_the_value_of_the_cross_entropy_and_the_gradient_of_the_sum():
    (batch,) = batches(1)
    loss, term, gradients = by_hand(batch)
    module = make_module(STRONG)
    found, penalty = module._training_losses(batch)
    assert found.item() == loss.item()
    assert penalty.item() == pytest.approx(term.item(), rel=1e-6)
    assert abs(term.item()) > 0.1
    assert not penalty.requires_grad
    found.backward()
    for parameter, expected in zip(module.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compiled_code_gives_the_same_in_one_graph(graphs, precision):
    gradients = []
    for compile in (False, True):
        module = make_module(STRONG, compile)
        for batch in batches(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                loss, _ = module._training_losses(batch)
            loss.backward()
        gradients.append([parameter.grad for parameter in module.model.parameters()])
    assert len(graphs) == 1
    ops = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("nerve.log_ratio" in op for op in ops) == 2, "one per layer"
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


class Gradients(L.Callback):
    """The gradients of each update."""

    def __init__(self) -> None:
        self.of_updates: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.of_updates.append([each.grad.clone() for each in module.model.parameters()])


def test_losses_are_stored_without_the_term_and_the_term_beside_them(tmp_path: Path):
    """In rows, scalars and what callbacks see; accumulation averages micro-batches, each with the
    term of its own features."""
    train, gradients = batches(4), Gradients()
    module = make_module(STRONG)
    metrics = fit(tmp_path, module, train, callbacks=[gradients], accumulate_grad_batches=2)
    parts = [by_hand(batch) for batch in train[:2]]
    for found, first, second in zip(gradients.of_updates[0], parts[0][2], parts[1][2], strict=True):
        torch.testing.assert_close(found, (first + second) / 2, rtol=1e-4, atol=1e-6)
    scalars = nerve.load_scalars(tmp_path)
    losses = metrics.groupby("step").train_loss.first()
    mean = sum(loss.item() for loss, _, _ in parts) / 2
    assert losses[1] == pytest.approx(mean, rel=1e-6)
    named = scalars[scalars.step == 0].set_index("name").value
    assert named["train_loss"] == pytest.approx(parts[1][0].item(), rel=1e-6)
    assert named["penalty"] == pytest.approx(parts[1][1].item(), rel=1e-5)
    held_out = sum(cross_entropy(module.model, batch).item() for batch in batches(2, seed=1)) / 2
    assert metrics.val_loss[metrics.step == 2].iloc[0] == pytest.approx(held_out, rel=1e-6)


def test_training_with_a_weight_moves_pr_its_way_and_one_of_0_changes_nothing(tmp_path: Path):
    """The PR of the measured features, at equal steps."""
    ratios = {}
    for weight in (-0.3, 0, 0.3, None):
        regularizer = NONE if weight is None else Regularizer("participation_ratio", weight)
        rows = fit(tmp_path / str(weight), make_module(regularizer), batches(8), every_n_steps=8)
        ratios[weight] = rows[rows.step == 8].pr_post.tolist()
    assert all(a > 1.02 * b for a, b in zip(ratios[-0.3], ratios[0], strict=True))
    assert all(a < 0.98 * b for a, b in zip(ratios[0.3], ratios[0], strict=True))
    assert ratios[0] == ratios[None]
