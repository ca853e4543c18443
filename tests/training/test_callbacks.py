"""The progress bar is whole and true, in a terminal and in a file."""

import io
import re
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from support import Batches

from nerve.training import callbacks
from nerve.training.callbacks import RunProgressBar


class Counts(L.LightningModule):
    """Its training step returns the number of targets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return {"loss": self.weight.sum(), "n_targets": 4}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_terminal_is_not_shown_the_loss_of_every_batch(monkeypatch):
    """Reading it waits for the device; the first and the last batch are always shown."""
    monkeypatch.setattr(callbacks, "SHOWN_EVERY_S", 1e9)
    monkeypatch.setattr(callbacks.sys.stdout, "isatty", lambda: True, raising=False)
    bar, module, asked = RunProgressBar("tokens"), Counts(), []
    monkeypatch.setattr(bar, "get_metrics", lambda *_: asked.append(1) or {})
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches([torch.zeros(1)] * 20))
    assert bar.train_progress_bar.n == 20
    assert 2 <= len(asked) <= 3  # Lightning asks at the end of the epoch as well


def test_the_bar_moves_with_each_batch_of_training(capsys):
    """In a file it is a line after some of the batches, here every second one, and the last."""
    bar, module = RunProgressBar("tokens"), Counts()
    bar._refresh_rate = 2
    batches = Batches([torch.zeros(1)] * 3)
    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).fit(module, batches)
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (3, 3)
    half, whole = capsys.readouterr().out.split("\n")[:-1]
    assert re.fullmatch(r" 67%\|.*\| 2/3 \[.*tokens/s=.*\]", half)
    assert re.fullmatch(r"100%\|.*\| 3/3 \[.*tokens/s=.*\]", whole)
    assert "tokens/s" in bar.get_metrics(module.trainer, module)


class Screen(io.StringIO):
    """A terminal with 80 columns."""

    def isatty(self) -> bool:
        return True


def bar_of(n_batches: int, of: int, resumed_at: int, metrics: dict[str, float], unit: str) -> str:
    """The line shown once a run that was resumed at a batch has done `n_batches` in total, at half
    a second and 100,000 tokens per batch."""
    bar = RunProgressBar(unit)
    batches = SimpleNamespace(current=SimpleNamespace(processed=resumed_at))
    trainer = SimpleNamespace(
        num_training_batches=of,
        callback_metrics=metrics,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=batches)),
        loggers=[],
        world_size=1,
    )
    bar._trainer = trainer
    bar.on_train_start(trainer)
    began = bar.train_progress_bar.start_t
    n_done = n_batches - resumed_at
    bar._seconds, bar._n_targets = 0.5 * n_done, 100_000 * n_done
    tqdm = bar.train_progress_bar
    tqdm.n, tqdm._time = n_batches, lambda: began + 0.5 * n_done
    tqdm.set_postfix(bar.get_metrics(trainer, None), refresh=False)
    line = str(tqdm)
    tqdm.disable = True
    return line


LOSSES = {"train_loss": 10.8249, "val_loss": 10.8251, "v_num": 3}


@pytest.mark.parametrize(
    ("metrics", "unit"),
    [({}, "tokens"), (LOSSES, "tokens"), (LOSSES | {"val_accuracy": 0.12345}, "images")],
)
@pytest.mark.parametrize("n", [100, 5_000, 100_000])
def test_the_bar_is_whole_at_80_columns(monkeypatch, metrics, unit, n):
    """Even for a run of 14 hours, every part of the bar is shown."""
    monkeypatch.setattr(sys, "stdout", Screen())
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (80, 24))
    line = bar_of(n // 2, n, 0, metrics, unit)
    assert len(line) <= 80
    assert line.startswith(" 50%|")
    assert f"| {n // 2}/{n} [" in line
    assert line.endswith(f"{unit}/s=200k]")
    for name, value in metrics.items():
        shown = {"train_loss": "loss=", "val_loss": "val=", "val_accuracy": "acc="}.get(name)
        told = shown is not None and f"{shown}{value:.3g}"[:7] in line
        assert told == (shown is not None and not (shown == "val=" and "acc=" in line))


@pytest.mark.parametrize("resumed_at", [0, 400, 799])
def test_the_rate_and_the_time_left_of_a_resumed_run_are_true(monkeypatch, resumed_at):
    """200 batches of half a second are left, and each has 100,000 tokens."""
    monkeypatch.setattr(sys, "stdout", Screen())
    line = bar_of(800, 1000, resumed_at, {}, "tokens")
    assert "| 800/1000 [" in line
    assert "<01:40, tokens/s=200k]" in line
