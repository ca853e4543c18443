"""As many FFNs are measured at once as memory allows; several passes give the same values."""

import pandas as pd
import pytest
import torch
from mixtures import batches_of, listed, model_of
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import nerve
from nerve.errors import ConfigError, MeasurementError
from nerve.measuring.passes import bytes_of, passes

D, FF = 4, 96
MATRIX = 8 * FF**2


class Net(nn.Module):
    """Blocks of one FFN each."""

    def __init__(self, n_layers: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(D, FF), nn.GELU(), nn.Linear(FF, D)) for _ in range(n_layers)
        )
        self.forwards: list[None] = []

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.append(None)
        for block in self.blocks:
            x = x + block(x)
        return x


class Peak(TorchDispatchMode):
    """The most bytes of `FF` x `FF` matrices that exist at the same time within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        if isinstance(given, Tensor) and given.untyped_storage().nbytes() == MATRIX:
            storage = given.untyped_storage()
            self._alive = {k: ref for k, ref in self._alive.items() if not ref.expired()}
            self._alive[storage._cdata] = StorageWeakRef(storage)
            self.peak = max(self.peak, MATRIX * len(self._alive))
        return given


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 50, D, generator=generator) for _ in range(2)]


@pytest.mark.parametrize(("n_matrices", "n_passes"), [(16, 1), (8, 3), (6, 6)])
def test_as_many_matrices_are_held_as_fit_and_no_more(batches, n_matrices, n_passes):
    """The peak is that of what is allocated; the values are the same to the last bit."""
    torch.manual_seed(0)
    net = Net()
    with Peak() as everything:
        expected = nerve.measure(net, batches, shortcut=False)
    assert everything.peak > 12 * MATRIX
    net.forwards.clear()
    ffns = nerve.find_ffns(net, batches[0])
    net.forwards.clear()
    with Peak() as measured:
        rows = nerve.measure(
            net, iter(batches), ffns=ffns, shortcut=False, memory=n_matrices * MATRIX
        )
    pd.testing.assert_frame_equal(rows, expected)
    assert len(net.forwards) == n_passes * (len(batches) + 1)  # one looks for the order of tokens
    assert measured.peak <= n_matrices * MATRIX


def test_experts_are_pooled_across_passes():
    """With one expert per pass, the pool continues from pass to pass."""
    model, batches = model_of("mixtral"), batches_of(padded=True)
    expected = nerve.measure(model, batches)
    ffns = nerve.find_ffns(model, batches[0])
    memory = 8 * 8 * 12**2
    assert len(passes(ffns, model, memory)) == 10
    rows = nerve.measure(model, batches, memory=memory)
    pd.testing.assert_frame_equal(rows, expected, rtol=1e-12)


def test_masks_apply_to_the_ffns_of_each_pass():
    """By name and as a list, the same as in a single pass."""
    net, batches = listed(), batches_of(padded=True)
    ffns = nerve.find_ffns(net, batches[0])
    memory = 8 * 8 * 12**2

    def one_each(batch):
        return [batch["attention_mask"] for _ in ffns]

    expected = nerve.measure(net, batches, ffns=ffns)
    for mask in (one_each, lambda batch: {f.name: batch["attention_mask"] for f in ffns}):
        rows = nerve.measure(net, batches, ffns=ffns, mask=mask, memory=memory)
        pd.testing.assert_frame_equal(rows, expected, rtol=1e-12)


def test_an_ffn_that_does_not_fit_raises_if_memory_is_given(batches):
    with pytest.raises(MeasurementError, match="ffn in layer 0 needs"):
        nerve.measure(Net(), batches, memory=5 * MATRIX)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 * 2**30), ("500 MB", 500_000_000), ("1.5 kib", 1536), (4096, 4096), ("7", 7)],
)
def test_memory_is_a_number_or_a_string(text, expected):
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["8 gigs", "-1", 0, True, None, ""])
def test_other_strings_raise(text):
    with pytest.raises(ConfigError, match="such as '8GiB'"):
        bytes_of(text)


def test_progress_reports_passes_batches_and_eigenproblems(batches, capsys):
    told = []
    nerve.measure(
        Net(2), batches, memory=6 * MATRIX, progress=lambda *how: told.append(how), shortcut=False
    )
    assert told == [
        ("batches, pass 1 of 2", 0, 2),
        ("batches, pass 1 of 2", 1, 2),
        ("eigenproblems", 0, 1),
        ("batches, pass 2 of 2", 0, 2),
        ("batches, pass 2 of 2", 1, 2),
        ("eigenproblems", 0, 1),
    ]
    nerve.measure(Net(1), batches, progress=True)
    assert capsys.readouterr().err == "0/2 batches\n0/1 eigenproblems\n"
