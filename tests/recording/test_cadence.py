"""A measured step is labeled with its own losses, and with those since the previous label."""

from functools import partial

import torch
from torch import nn

from nerve.optim import Part, Schedule, build_optimizer
from nerve.recording.cadence import Cadence, hidden_lr

ADAMW = partial(torch.optim.AdamW, lr=3e-3)
MUON = partial(torch.optim.Muon, lr=0.02)


def loss(value: float) -> torch.Tensor:
    return torch.tensor(value)


def label(cadence: Cadence, step: int) -> None:
    cadence.label(step, 0.1, n_processes=1, is_split=False)


def test_losses_are_means_over_targets_and_training_restarts_with_each_label():
    cadence = Cadence()
    cadence.add_training(loss(1.0), 3, 2)
    cadence.add_training(loss(5.0), 1, 2)
    cadence.add_validation(loss(9.0), 1)
    cadence.start_validation()  # what was counted before does not count
    cadence.add_validation(loss(2.0), 1)
    cadence.add_validation(loss(4.0), 3)
    label(cadence, 7)
    assert cadence.take_due() == {
        "step": 7,
        "tokens_seen": 8,
        "train_loss": 2.0,
        "val_loss": 3.5,
        "lr": 0.1,
    }
    assert cadence.due is None
    cadence.add_training(loss(6.0), 2, 2)
    label(cadence, 8)
    due = cadence.due
    assert due is not None
    assert (due["train_loss"], due["tokens_seen"]) == (6.0, 12)


def test_losses_of_a_canceled_step_count_for_the_next_one():
    """Also through a checkpoint, as for a fit that stops between two measured steps and resumes."""
    cadence, other = Cadence(), Cadence()
    cadence.add_training(loss(1.0), 1, 1)
    label(cadence, 1)
    cadence.add_training(loss(3.0), 1, 1)
    cadence.drop_due()
    assert cadence.due is None
    other.load_state_dict(cadence.state_dict())
    other.add_training(loss(5.0), 2, 1)
    label(other, 3)
    assert other.due is not None
    assert other.due["train_loss"] == 3.5
    assert other.take_due() is not None
    other.drop_due()  # what was measured does not count again
    label(other, 4)
    assert other.due["train_loss"] is None


def test_without_batches_there_is_no_loss():
    cadence = Cadence()
    label(cadence, 0)
    assert cadence.due is not None
    assert cadence.due["train_loss"] is cadence.due["val_loss"] is cadence.val_loss is None


def test_a_checkpoint_resumes_between_two_labels():
    one, other = Cadence(), Cadence()
    one.add_training(loss(1.0), 1, 1)
    other.load_state_dict(one.state_dict())
    for cadence in (one, other):
        cadence.add_training(loss(4.0), 2, 1)
        label(cadence, 3)
    assert one.due == other.due
    assert one.due is not None
    assert one.due["train_loss"] == 3.0


def test_hidden_lr_follows_the_schedule_of_the_hidden_weights():
    parts = {"rest": Part(("vector",), ADAMW), "matrices": Part(("hidden",), MUON)}
    optimizer = build_optimizer(nn.Linear(4, 4), parts)
    scheduler = Schedule("linear").scheduler(optimizer, n_steps=4)
    assert hidden_lr(optimizer) == 0.02
    optimizer.step()
    scheduler.step()
    assert hidden_lr(optimizer) == 0.02 * 0.75


def test_hidden_lr_of_groups_without_roles_is_their_common_one():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.1, 0.2)]
    assert hidden_lr(torch.optim.SGD(groups[:2])) == 0.1
    assert hidden_lr(torch.optim.SGD(groups)) is None
