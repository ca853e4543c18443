"""Global generators continue as if nothing had happened since their states were taken."""

import random

import lightning as L
import numpy as np
import torch

from nerve.training.checkpoint_files import read_checkpoint, write_checkpoint
from nerve.training.randomness import part_from_other_processes, random_states, set_random_states


def draw() -> list[float]:
    """An odd number of draws, so that one half of a pair is left over."""
    normals = [random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))]
    return [*normals, random.random(), *np.random.rand(3), *torch.rand(3).tolist()]


def test_states_survive_a_checkpoint(tmp_path):
    draw()
    write_checkpoint(tmp_path / "states.ckpt", random_states())
    first, second = draw(), draw()
    assert first != second
    set_random_states(read_checkpoint(tmp_path / "states.ckpt"))
    assert [draw(), draw()] == [first, second]


def test_processes_draw_masks_of_their_own_and_process_0_those_of_one_alone():
    """Nor do two seeds coincide: process 1 of seed 0 differs from process 0 of seed 1."""

    def mask(seed: int, rank: int) -> tuple[float, ...]:
        L.seed_everything(seed, verbose=False)
        part_from_other_processes(rank)
        return tuple(torch.rand(4).tolist())

    masks = {(seed, rank): mask(seed, rank) for seed in (0, 1) for rank in (0, 1, 2)}
    assert len(set(masks.values())) == 6
    for seed in (0, 1):
        L.seed_everything(seed, verbose=False)
        assert masks[seed, 0] == tuple(torch.rand(4).tolist())
