from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nerve.data.batches import BatchDataModule, ShuffledOrder
from nerve.errors import ConfigError

N_STEPS = 10


class Items(BatchDataModule):
    """Batches of item numbers, where each item is its own label."""

    def __init__(self, n_train_batches: int = N_STEPS) -> None:
        super().__init__(batch_size=4, n_train_batches=n_train_batches, seed=0)

    def _fetch(self, indices: np.ndarray):
        items = torch.from_numpy(indices)
        return items, items

    def train_dataloader(self):
        return self._train_loader(self._fetch, ShuffledOrder(7, self.batch_size, self.seed))

    def val_dataloader(self):
        return self._heldout_batches(self._fetch, 6)


class Recorder(LightningModule):
    """Records the items of each training and validation batch; trains one weight on them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.trained: list[list[int]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch[0].tolist())
        return (self.weight * batch[0].float()).mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[0].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class SaveEachStep(Callback):
    """Saves at the end of each step, like `ModelCheckpoint`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


class Interrupt(Callback):
    """Stops training abruptly at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("interrupted")


def fit(folder, *callbacks, ckpt_path=None, n_train_batches=N_STEPS, **values) -> Recorder:
    """Trains `N_STEPS` steps and keeps a checkpoint of each in `folder`."""
    values = {"max_steps": N_STEPS, "limit_val_batches": 0} | values
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*callbacks, SaveEachStep(folder)],
        **values,
    )
    module = Recorder()
    trainer.fit(module, Items(n_train_batches), ckpt_path=ckpt_path, weights_only=False)
    return module


@pytest.mark.parametrize("k", [1, 4, 9, 10])
@pytest.mark.parametrize("limit_val_batches", [0, 1.0])
def test_a_training_resumed_after_step_k_gets_exactly_the_batches_left(
    tmp_path, k, limit_val_batches
):
    """Also from a checkpoint before the interruption, and with validation in between."""
    values = {"limit_val_batches": limit_val_batches, "val_check_interval": 2}
    whole = fit(tmp_path / "whole", **values)
    assert whole.trained == [items.tolist() for items, _ in Items().train_dataloader()]
    if k < N_STEPS - 2:
        with pytest.raises(RuntimeError, match="interrupted"):
            fit(tmp_path / "parts", Interrupt(k + 2), **values)
    else:
        fit(tmp_path / "parts", **values)
    checkpoint = tmp_path / "parts" / f"step={k}.ckpt"
    resumed = fit(tmp_path / "resumed", ckpt_path=checkpoint, **values)
    assert resumed.trained == whole.trained[k:]
    assert resumed.trainer.global_step == N_STEPS


def test_a_finished_training_can_be_made_longer(tmp_path):
    fit(tmp_path / "short", n_train_batches=6, max_steps=6)
    longer = fit(tmp_path / "longer", ckpt_path=tmp_path / "short" / "step=6.ckpt")
    assert longer.trained == fit(tmp_path / "whole").trained[6:]


def test_an_interruption_in_a_step_counts_its_batch_as_consumed(tmp_path):
    """The documented limit: such a checkpoint has not been trained on the batch after which it
    resumes."""
    states = []

    class Save(Interrupt):
        def on_exception(self, trainer, module, exception):
            states.append(trainer.fit_loop._combined_loader._state_dicts())

    with pytest.raises(RuntimeError, match="interrupted"):
        fit(tmp_path, Save(3))
    assert states == [[{"position": 4}]]


def test_validation_sees_the_whole_held_out_set_each_time(tmp_path):
    validated = fit(tmp_path, limit_val_batches=1.0, val_check_interval=5).validated
    assert validated == [[0, 1, 2, 3], [4, 5]] * 3  # the sanity check, and twice in training


def attached(rank: int, world_size: int) -> Items:
    items = Items()
    items.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return items


def test_processes_share_each_training_batch_and_all_see_the_whole_held_out_set():
    ranks = [attached(rank, 2) for rank in range(2)]
    whole = [items.tolist() for items, _ in Items().train_dataloader()]
    shards = [[items.tolist() for items, _ in rank.train_dataloader()] for rank in ranks]
    assert [first + second for first, second in zip(*shards, strict=True)] == whole
    heldout = [[items.tolist() for items, _ in rank.val_dataloader()] for rank in ranks]
    assert heldout == [[[0, 1], [2, 3], [4, 5]]] * 2


def test_processes_that_cannot_share_a_batch_are_an_error():
    with pytest.raises(ConfigError, match="got 4 for 3 processes"):
        attached(0, 3).train_dataloader()
