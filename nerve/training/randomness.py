"""The global random states of this process, as values that can be stored."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def part_from_other_processes(rank: int) -> None:
    """Lets torch draw other numbers in process `rank` of a run than in those that were seeded as it
    was, for dropout masks of its own. Process 0 goes on as a process alone would.
    """
    if rank:
        # Hashed: the CPU's generator reads the lower 32 bits alone.
        (seed,) = np.random.SeedSequence([torch.initial_seed(), rank]).generate_state(1)
        torch.manual_seed(int(seed))


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, as numbers and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(name), [int(key) for key in keys], position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Makes the generators go on as they would have when `random_states` was called."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
