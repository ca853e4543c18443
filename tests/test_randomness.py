"""Global generators go on as if nothing had happened since their states were taken."""

import random

import numpy as np
import torch

from nerve.checkpoint import read_checkpoint, write_checkpoint
from nerve.randomness import random_states, set_random_states


def draw() -> list[float]:
    """Odd numbers of draws, so that halves of pairs are kept over."""
    normals = [random.gauss(0, 1), float(np.random.randn()), float(torch.randn(()))]
    return [*normals, random.random(), *np.random.rand(3), *torch.rand(3).tolist()]


def test_states_survive_a_checkpoint(tmp_path):
    draw()
    write_checkpoint(tmp_path / "states.ckpt", random_states())
    first, second = draw(), draw()
    assert first != second
    set_random_states(read_checkpoint(tmp_path / "states.ckpt"))
    assert [draw(), draw()] == [first, second]
