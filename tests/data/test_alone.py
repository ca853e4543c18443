"""Batches are made by the thread that trains alone: torch's other threads would compete with those
that solve spectra."""

import os
import sys
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch

from nerve.data import batches
from nerve.data.batches import pinned
from nerve.data.text import _inputs_and_targets

WINDOWS = np.random.default_rng(0).integers(50_000, size=(512, 257))
"""More than torch copies in one thread."""


def n_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def unpinned(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
    """What `torch.empty` returns where there is a GPU, but for its place."""
    assert pin_memory
    assert dtype == torch.int64
    return torch.from_numpy(np.empty(shape, np.int64))


def make_batches() -> None:
    torch.set_num_threads(4)
    batches.torch = SimpleNamespace(empty=unpinned)
    before = n_threads()
    for each in _inputs_and_targets(WINDOWS):
        pinned(each)
    assert n_threads() == before
    torch.from_numpy(WINDOWS)[:, :-1].contiguous()
    assert n_threads() > before, "torch's threads would not have been noticed"


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_text_batches_are_made_and_pinned_without_other_threads(tmp_path):
    log = tmp_path / "log"
    assert processes.ended(processes.start(make_batches, cwd=tmp_path, log=log)) == 0, (
        log.read_text()
    )


def test_inputs_and_targets_are_shifted_by_one():
    inputs, targets = _inputs_and_targets(WINDOWS)
    np.testing.assert_array_equal(inputs, WINDOWS[:, :-1])
    np.testing.assert_array_equal(targets, WINDOWS[:, 1:])
    assert inputs.is_contiguous()
    assert targets.is_contiguous()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "tensor", [torch.arange(12).reshape(3, 4)[:, 1:], torch.rand(2, 3, 5).flip(-1)]
)
def test_a_pinned_copy_equals_its_tensor(tensor):
    copy = pinned(tensor)
    assert copy.is_pinned()
    assert copy.dtype == tensor.dtype
    assert torch.equal(copy, tensor)
