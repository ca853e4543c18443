"""The normalization factor: the norms' formulas, the placements, and invalid combinations."""

import numpy as np
import pytest
import torch
from torch import nn

from nerve.errors import ConfigError
from nerve.nn.normalization import Normalization


def test_layernorm_and_rmsnorm_follow_their_formulas() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    array = x.double().numpy()
    centered = array - array.mean(-1, keepdims=True)
    layernorm = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-3)
    rmsnorm = array / np.sqrt((array**2).mean(-1, keepdims=True) + 1e-3)
    for kind, expected in (("layernorm", layernorm), ("rmsnorm", rmsnorm), ("none", array)):
        actual = Normalization(kind=kind, eps=1e-3).build(8)(x).detach().numpy()
        np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_the_final_norm_stays_without_norms_and_can_be_switched_off() -> None:
    assert isinstance(Normalization(kind="none").build(8), nn.Identity)
    assert isinstance(Normalization(kind="none").build_final(8), nn.LayerNorm)
    assert isinstance(Normalization(kind="rmsnorm").build_final(8), nn.RMSNorm)
    assert Normalization(kind="none", eps=1e-3).build_final(8).eps == 1e-3
    for kind in ("layernorm", "none"):
        assert isinstance(Normalization(kind=kind, final=False).build_final(8), nn.Identity)


def test_mix_is_post_in_the_first_layers_and_pre_in_the_others() -> None:
    mixed = Normalization(placement="mix", n_post_layers=2)
    assert mixed.placements(5) == ["post", "post", "pre", "pre", "pre"]
    assert Normalization(placement="post").placements(2) == ["post", "post"]


@pytest.mark.parametrize("placement", ["post", "mix", "pre_residual_after_norm"])
def test_no_norm_cannot_be_placed(placement: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"normalization\.kind=none .*normalization\.placement={placement}"
    ):
        Normalization(kind="none", placement=placement, n_post_layers=int(placement == "mix"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "layer_norm"}, r"normalization\.kind must be one of .*Did you mean 'layernorm'"),
        ({"placement": "sandwich"}, r"normalization\.placement must be one of pre, post"),
        ({"placement": "mix"}, r"n_post_layers.*placement=mix"),
        ({"placement": "post", "n_post_layers": 1}, r"n_post_layers=1 with placement=post"),
        ({"eps": 0.0}, r"normalization\.eps must be positive"),
    ],
)
def test_bad_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Normalization(**values)


@pytest.mark.parametrize("n_post_layers", [-1, 4, 5])
def test_mix_leaves_layers_of_both_placements(n_post_layers: int) -> None:
    mixed = Normalization(placement="mix", n_post_layers=n_post_layers)
    with pytest.raises(ConfigError, match=r"normalization\.n_post_layers .*model\.n_layers=4"):
        mixed.placements(4)
