"""What an error of a GPU means for a run."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nerve.config import pasted
from nerve.errors import DeviceError, first_line
from nerve.storage.directory import RunDirectory

_OF_A_GPU = re.compile(r"(CUDA|HIP|cuDNN|cuBLAS) error\b|Triton Error \[(CUDA|HIP)\]")
"""How torch's and Triton's messages begin where the error has no type of its own."""


def is_of_device(error: BaseException) -> bool:
    """Whether a device failed or had no memory left. After a failure, none of its tensors can be
    read."""
    has_type = isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError)
    return has_type or (type(error) is RuntimeError and _OF_A_GPU.match(str(error)) is not None)


@contextmanager
def explained(run: RunDirectory) -> Iterator[None]:
    """Says what an error of a device within the block means for a run, and what to do.

    Raises:
        DeviceError: in place of the error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_of_device(error):
            raise
        reported = first_line(error)
        raise DeviceError(_advice(error, reported, run)) from error


def _advice(error: RuntimeError, reported: str, run: RunDirectory) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"A run must fit into the memory of its device; torch reports: {reported}. Halve "
            "data.batch_size and double trainer.accumulate_grad_batches, which trains on the same "
            "batches, or let fewer runs share the device; check=true estimates a part of it."
        )
    resumed = "from its last checkpoint" if run.checkpoint("last").exists() else "from its start"
    return (
        f"The device of a run failed; torch reports, perhaps later than it happened: {reported}. "
        f"What was measured before is kept; nerve-run {pasted('resume', run.path)} retry=true "
        f"continues the run {resumed}. If this happens again at the same step, compile=false with "
        "HYDRA_FULL_ERROR=1 CUDA_LAUNCH_BLOCKING=1 shows where."
    )
