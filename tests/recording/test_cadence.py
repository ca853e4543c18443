"""A measured step is labeled with its own losses, and what passed since the step before."""

import torch

from nerve.recording.cadence import Cadence


def loss(value: float) -> torch.Tensor:
    return torch.tensor(value)


def label(cadence: Cadence, step: int) -> None:
    cadence.label(step, 0.1, n_processes=1, is_split=False)


def test_losses_are_means_over_targets_and_training_starts_anew_with_each_label():
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


def test_without_a_batch_there_is_no_loss():
    cadence = Cadence()
    label(cadence, 0)
    assert cadence.due is not None
    assert cadence.due["train_loss"] is cadence.due["val_loss"] is cadence.val_loss is None


def test_a_checkpoint_goes_on_in_the_middle():
    one, other = Cadence(), Cadence()
    one.add_training(loss(1.0), 1, 1)
    other.load_state_dict(one.state_dict())
    for cadence in (one, other):
        cadence.add_training(loss(4.0), 2, 1)
        label(cadence, 3)
    assert one.due == other.due
    assert one.due is not None
    assert one.due["train_loss"] == 3.0
