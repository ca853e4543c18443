"""Which errors are those of a device, and what a run says about them."""

import pytest
import torch

from nerve.config import pasted
from nerve.errors import DeviceError
from nerve.storage.directory import RunDirectory
from nerve.training.device_errors import explained, is_of_device

LAUNCH = torch.AcceleratorError(
    "CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure'.\n"
)
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    "error",
    [
        LAUNCH,
        MEMORY,
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(…)`"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_errors_of_a_device_are_told_by_their_type_or_by_how_they_begin(error):
    assert is_of_device(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.linalg.LinAlgError("the matrix is singular"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"),  # also of NaN
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("The model raised a CUDA error: none"),
        ValueError("CUDA error: of another type"),
        NotImplementedError("CUDA error: of a subclass"),
    ],
)
def test_other_errors_are_not_and_stay_as_they_are(error, tmp_path):
    assert not is_of_device(error)
    with pytest.raises(type(error)) as raised, explained(RunDirectory(tmp_path)):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_device_that_failed_is_named_with_the_command_that_continues(tmp_path, has_checkpoint):
    run = RunDirectory(tmp_path / "a run")
    if has_checkpoint:
        run.checkpoint("last").parent.mkdir(parents=True)
        run.checkpoint("last").touch()
    with pytest.raises(DeviceError) as raised, explained(run):
        raise LAUNCH
    assert raised.value.__cause__ is LAUNCH
    message = str(raised.value)
    assert "CUDA error: unspecified launch failure. What" in message
    assert "Search for" not in message
    assert f"nerve-run {pasted('resume', run.path)} retry=true" in message
    assert ("its last checkpoint" in message) == has_checkpoint
    assert ("its start" in message) != has_checkpoint


def test_too_little_memory_has_advice_of_its_own(tmp_path):
    advice = r"Tried to allocate 2.00 GiB\. Halve data\.batch_size"
    with pytest.raises(DeviceError, match=advice), explained(RunDirectory(tmp_path)):
        raise MEMORY
