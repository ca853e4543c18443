"""The wirings of a block against their formulas, and their effect on the residual stream."""

import pytest
import torch
from torch import nn

from nerve.nn.normalization import WIRINGS


@pytest.fixture
def parts() -> tuple[torch.Tensor, nn.Module, nn.Module]:
    torch.manual_seed(0)
    return 3 * torch.randn(2, 4, 6), nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 6), nn.Tanh())


def test_pre_post_and_residual_after_norm_follow_their_formulas(
    parts: tuple[torch.Tensor, nn.Module, nn.Module],
) -> None:
    x, norm, f = parts
    pre, post = x + f(norm(x)), norm(x + f(x))
    after = norm(x) + f(norm(x))
    expected = {"pre": (pre, pre), "post": (post, post), "pre_residual_after_norm": (after, pre)}
    assert WIRINGS.keys() == expected.keys()
    for name, wirings in WIRINGS.items():
        for wiring, result in zip(wirings, expected[name], strict=True):
            assert torch.equal(wiring(x, norm, f), result)


def test_a_silent_sublayer_leaves_the_stream_alone_in_pre_only(
    parts: tuple[torch.Tensor, nn.Module, nn.Module],
) -> None:
    x, norm, _ = parts
    for name, (first, second) in WIRINGS.items():
        assert torch.equal(first(x, norm, torch.zeros_like), x) == (name == "pre")
        assert torch.equal(second(x, norm, torch.zeros_like), x) == (name != "post")
