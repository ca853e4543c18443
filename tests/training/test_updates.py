"""The learning rate that a row names: that of the hidden weights, as the schedule left it."""

from functools import partial

import torch
from torch import nn

from nerve.optim import Part, Schedule, build_optimizer
from nerve.training.updates import hidden_lr

ADAMW = partial(torch.optim.AdamW, lr=3e-3)
MUON = partial(torch.optim.Muon, lr=0.02)


def test_hidden_lr_follows_the_schedule_of_the_hidden_part():
    parts = {"rest": Part(("vector",), ADAMW), "matrices": Part(("hidden",), MUON)}
    optimizer = build_optimizer(nn.Linear(4, 4), parts)
    scheduler = Schedule("linear").scheduler(optimizer, n_steps=4)
    assert hidden_lr(optimizer) == 0.02
    optimizer.step()
    scheduler.step()
    assert hidden_lr(optimizer) == 0.02 * 0.75


def test_hidden_lr_of_groups_without_roles_is_the_one_that_they_share():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.1, 0.2)]
    assert hidden_lr(torch.optim.SGD(groups[:2])) == 0.1
    assert hidden_lr(torch.optim.SGD(groups)) is None
