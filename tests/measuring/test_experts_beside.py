"""Experts in a list that do not receive a selection of their mixture's tokens as they are: all of
them, scaled ones, or tokens with rows of zeros."""

import pytest
import torch
from by_hand import Plain, assert_measured
from torch import Tensor, nn

import nerve
from nerve.errors import MeasurementError

D, FF, N, VOCAB = 6, 16, 3, 40


class Mixture(nn.Module):
    """Gives each token to one expert, in a way of its own; keeps the tokens of each."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.router = nn.Linear(D, N)
        self.experts = nn.ModuleList(Plain(nn.Linear(D, FF), nn.Linear(FF, D)) for _ in range(N))
        self.kept: list[list[Tensor]] = [[] for _ in range(N)]

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            own = torch.ones_like(chosen).bool() if self.way == "all" else chosen == index
            given = tokens[own]
            if self.way == "scaled":
                given = given * weights[own, None]
            self.kept[index].append(given)
            if self.way == "zeros":
                given = nn.functional.pad(given, (0, 0, 0, 2))
            if self.way == "masked":
                given = tokens * own[:, None]
            y = expert(given)
            y = y[own] if self.way == "masked" else y[: int(own.sum())]
            out = out.index_add(0, own.nonzero()[:, 0], y * weights[own, None])
        return out.reshape(x.shape)


class Net(nn.Module):
    """A plain FFN, then two mixtures."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, D)
        first = Plain(nn.Linear(D, FF), nn.Linear(FF, D))
        self.blocks = nn.ModuleList([first, Mixture(way), Mixture(way)])
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return x


def net_of(way: str) -> Net:
    torch.manual_seed(0)
    return Net(way).eval()


IDS = torch.randint(VOCAB, (8, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("way", ["all", "scaled", "zeros", "masked"])
def test_experts_beside_one_another_are_no_layers_and_zeros_no_samples(way):
    net = net_of(way)
    ffns = nerve.find_ffns(net, IDS)
    for mixture in net.blocks[1:]:
        mixture.kept = [[] for _ in range(N)]
    rows = nerve.measure(net, [IDS], ffns=ffns).set_index(["layer", "ffn"])
    assert len(rows) == 1 + 2 * (N + 1)
    for layer, mixture in enumerate(net.blocks[1:], 1):
        for index, expert in enumerate(mixture.experts):
            with torch.no_grad():
                pre = expert.up(mixture.kept[index][-1])
            assert_measured(rows.loc[(layer, f"expert_{index}")].to_dict(), pre, pre.relu())
    n_of_all = IDS.numel() * (N if way == "all" else 1)
    assert rows.loc[(1, "experts"), "n_samples"] == n_of_all


@pytest.mark.parametrize("way", ["all", "zeros"])
def test_padding_does_not_count_for_them(way):
    net, mask = net_of(way), torch.ones_like(IDS)
    mask[2, 5:] = mask[5, 3:] = 0
    rows = nerve.measure(net, [{"input_ids": IDS, "attention_mask": mask}])
    pools = rows.set_index(["layer", "ffn"])["n_samples"]
    n = int(mask.sum()) * (N if way == "all" else 1)
    assert [pools[1, "experts"], pools[2, "experts"]] == [n, n]


def test_zeros_that_may_be_tokens_are_refused():
    """The mixture has received one such token, and an expert more rows of zeros."""
    net = net_of("zeros")
    ffns = nerve.find_ffns(net, IDS)
    with torch.no_grad():
        net.embedding.weight[0] = 0
        for linear in (net.blocks[0].up, net.blocks[0].down):
            linear.bias.zero_()
    ids = IDS.clamp(min=1)
    ids[0, 0] = 0
    with pytest.raises(MeasurementError, match="Rows of zeros that fill up an expert"):
        nerve.measure(net, [ids], ffns=ffns)


def test_blocks_that_follow_one_another_stay_layers():
    """Also if each receives another number of samples than the first, as after downsampling."""

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Plain(nn.Linear(D, FF), nn.Linear(FF, D)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = (x + block(x))[:, ::2]
            return x

    found = nerve.find_ffns(Pooling(), torch.randn(4, 16, D))
    assert [(ffn.layer, ffn.name) for ffn in found] == [(0, "ffn"), (1, "ffn"), (2, "ffn")]
