"""A small FFN made of any two projections, and the metrics of features in float64 NumPy."""

import numpy as np
import pytest
from torch import Tensor, nn


class Plain(nn.Module):
    """down(relu(up(x)))."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = up, nn.ReLU(), down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


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
