"""The global random states of this process, as values that can be stored."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def part_from_other_processes(rank: int) -> None:
    """Gives process `rank` of a run its own torch seed, so that dropout masks differ between
    processes that were seeded alike. Process 0 keeps its seed, as a run of one process does.
    """
    if rank:
        # Hashed, because the CPU's generator uses only the lower 32 bits.
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
    """Restores the generators to the states that `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
