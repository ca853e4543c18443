"""A small FFN made of any two projections, two FFNs in a row, and the metrics of features in
float64 NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """down(relu(up(x)))."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = up, nn.ReLU(), down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Net(nn.Module):
    """Two FFNs in a row, of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4)) for _ in range(2)
        )

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for ffn in self.ffns:
            x = x + ffn(x)
        return {"loss": x.square().mean()}


def values(x: Tensor) -> tuple[int, float, float]:
    """Number of samples, participation ratio and variance of features `[*samples, width]`."""
    rows = x.detach().reshape(-1, x.shape[-1]).double().numpy()
    c = np.cov(rows.T)
    return len(rows), np.trace(c) ** 2 / np.square(c).sum(), np.trace(c)


def assert_measured(row: dict, pre: Tensor, post: Tensor) -> None:
    """Asserts that a row has the metrics of these features, to 1e-6."""
    assert (row["status"], row["d_ff"]) == ("ok", pre.shape[-1])
    for side, features in (("pre", pre), ("post", post)):
        n, pr, variance = values(features)
        assert row["n_samples"] == n
        assert row[f"pr_{side}"] == pytest.approx(pr, rel=1e-6)
        assert row[f"variance_{side}"] == pytest.approx(variance, rel=1e-6)
