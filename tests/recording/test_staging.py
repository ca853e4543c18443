"""The copy on the host equals what the device had, whatever the buffer contained before."""

import pytest
import torch
from torch import nn

from nerve.measuring.eigenproblem import FFNEigenproblem, GroupEigenproblem
from nerve.measuring.ffns import FFNAdapter
from nerve.recording.staging import N_BUFFERS, HostBuffer, Staging, expected_bytes

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def eigenproblem(width: int, seed: int, samples: int | None = None) -> FFNEigenproblem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return FFNEigenproblem(
        layer=1,
        ffn="ffn",
        n_samples=2000,
        d_in=3,
        d_ff=width,
        precision="float64",
        before=draw(3, 3),
        post=draw(width, width),
        shares=draw(2, 4),
        weight=draw(width, 3).bfloat16(),
        of_input=True,
        post_samples=None if samples is None else draw(samples, width).float(),
    )


def moved(problem: FFNEigenproblem, device: str) -> FFNEigenproblem:
    values = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(problem).items()
    }
    return FFNEigenproblem(**values)


@pytest.mark.parametrize("device", DEVICES)
def test_eigenproblems_of_any_size_are_copied_completely(device):
    """One after the other through the same buffers; the lower triangle of matrices that are wider
    than a block, and of smaller ones."""
    staging = Staging(torch.device(device))
    given = [eigenproblem(w, seed, samples=s) for seed, (w, s) in enumerate([(900, None), (5, 4)])]
    taken = [staging.to_host(moved(problem, device)) for problem in given for _ in range(3)]
    for problem, copy in zip([p for p in given for _ in range(3)], taken, strict=True):
        for name, value in vars(problem).items():
            copied = getattr(copy, name)
            if isinstance(value, torch.Tensor):
                assert copied.device == CPU
                of_matrix = name in ("before", "post")
                torch.testing.assert_close(
                    copied.tril() if of_matrix else copied,
                    value.tril() if of_matrix else value,
                    rtol=0,
                    atol=0,
                )
            else:
                assert copied == value


def test_a_buffer_is_allocated_once_for_everything_that_fits():
    buffer = HostBuffer(pinned=False)
    buffer.reserve(1000)
    memory = buffer._memory.data_ptr()
    for _ in range(3):
        (copy,) = buffer.hold([torch.arange(100.0)])
        assert copy.data_ptr() == memory
        torch.testing.assert_close(copy, torch.arange(100.0))


@pytest.mark.parametrize(("d_ff", "d_in"), [(7, 3), (900, 64), (384, 384)])
def test_the_expected_size_is_sufficient(d_ff, d_in):
    """Also if pre is as wide as post, and the weight is in float32."""
    ffn = FFNAdapter(0, "ffn", nn.Linear(d_in, d_ff), nn.Linear(d_ff, d_in))
    problem = eigenproblem(d_ff, 0)
    tensors = vars(problem) | {"before": problem.post, "weight": torch.zeros(d_ff, d_in)}
    staging = Staging(CPU)
    staging.reserve(expected_bytes(ffn))
    buffers = [staging._buffers.get() for _ in range(N_BUFFERS)]
    before = {buffer._memory.data_ptr() for buffer in buffers}
    for buffer in buffers:
        staging._buffers.put(buffer)
    staging.to_host(FFNEigenproblem(**tensors))
    assert {staging._buffers.get()._memory.data_ptr() for _ in range(N_BUFFERS)} == before


def test_a_model_that_does_not_declare_its_width_reserves_little():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 3))

    assert expected_bytes(FFNAdapter(0, "ffn", Odd(), Odd())) < 10_000


def test_a_failed_copy_returns_its_buffer(monkeypatch):
    staging = Staging(CPU)

    def refuse(*args):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(HostBuffer, "reserve", refuse)
        for _ in range(N_BUFFERS + 1):
            with pytest.raises(RuntimeError, match="no memory"):
                staging.to_host(eigenproblem(5, 0))
    staging.to_host(eigenproblem(5, 0))


def test_memory_that_cannot_be_reserved_is_requested_again(monkeypatch):
    """No thread waits for a buffer that is not returned."""
    staging = Staging(CPU)

    def refuse(*args):
        raise RuntimeError("no memory to pin")

    with monkeypatch.context() as patch:
        patch.setattr(HostBuffer, "reserve", refuse)
        with pytest.raises(RuntimeError, match="no memory to pin"):
            staging.reserve(1000)
    assert staging._buffers.qsize() == N_BUFFERS
    staging.to_host(eigenproblem(5, 0))


def test_the_eigenproblem_of_a_group_is_copied_like_that_of_an_ffn():
    matrix = torch.randn(500, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = GroupEigenproblem(0, "ffn", "pre", "halves", "a", 9, 500, matrix, torch.ones(500, 3))
    taken = Staging(CPU).to_host(given)
    torch.testing.assert_close(taken.matrix.tril(), matrix.tril(), rtol=0, atol=0)
    torch.testing.assert_close(taken.weight, given.weight, rtol=0, atol=0)
    assert (taken.site, taken.group, taken.dim) == ("pre", "a", 500)
