"""The feed-forward network against einsums, its exact width, and the attributes for a probe."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nerve.errors import ConfigError
from nerve.nn.constraint import CONSTRAINTS
from nerve.nn.ffn import FeedForward, FFNDesign


def test_plain_is_down_of_the_activated_up() -> None:
    torch.manual_seed(0)
    ffn = FeedForward(6, 10, nn.GELU()).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    hidden = F.gelu(torch.einsum("bti,hi->bth", x, ffn.up.weight) + ffn.up.bias)
    expected = torch.einsum("bth,oh->bto", hidden, ffn.down.weight) + ffn.down.bias
    torch.testing.assert_close(ffn(x), expected)


def test_gated_multiplies_the_activated_gate_by_up() -> None:
    torch.manual_seed(0)
    ffn = FeedForward(6, 10, nn.SiLU(), gated=True, bias=False).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate = torch.einsum("bti,hi->bth", x, ffn.gate.weight)
    up = torch.einsum("bti,hi->bth", x, ffn.up.weight)
    expected = torch.einsum("bth,oh->bto", gate * torch.sigmoid(gate) * up, ffn.down.weight)
    torch.testing.assert_close(ffn(x), expected)
    assert len(list(ffn.parameters())) == 3


@pytest.mark.parametrize("gated", [False, True])
def test_pre_gives_and_post_takes_the_features(gated: bool) -> None:
    """With hooks like those of a probe: the output of `pre` is u or g, the input of `post` is h."""
    torch.manual_seed(0)
    ffn = FeedForward(6, 10, nn.ReLU(), gated=gated, layer=3, name="channel_mixing")
    assert (ffn.layer, ffn.name) == (3, "channel_mixing")
    seen: dict[str, Tensor] = {}
    ffn.pre.register_forward_hook(lambda module, args, output: seen.update(pre=output))
    ffn.post.register_forward_pre_hook(lambda module, args: seen.update(post=args[0]))
    x = torch.randn(4, 6)
    ffn(x)
    assert torch.equal(seen["pre"], (ffn.gate if gated else ffn.up)(x))
    expected = seen["pre"].relu() * (ffn.up(x) if gated else 1)
    assert torch.equal(seen["post"], expected)


@pytest.mark.parametrize("gated", [False, True])
def test_every_matrix_is_registered_once(gated: bool) -> None:
    ffn = FeedForward(6, 10, nn.ReLU(), gated=gated)
    matrices = ["up", "gate", "down"] if gated else ["up", "down"]
    assert list(ffn.state_dict()) == [f"{m}.{p}" for m in matrices for p in ("weight", "bias")]


@pytest.mark.parametrize("constraint", [name for name in CONSTRAINTS if name != "none"])
def test_a_constraint_holds_every_matrix(constraint: str) -> None:
    ffn = FeedForward(6, 10, nn.ReLU(), gated=True, constraint=constraint)
    for matrix in (ffn.up, ffn.gate, ffn.down):
        assert hasattr(matrix, "parametrizations")


@pytest.mark.parametrize(
    ("width", "d_ff", "d_model", "expected"),
    [
        (4, None, 128, 512),
        (0.5, None, 768, 384),
        ("8/3", None, 768, 2048),
        (" 8/3", None, 3, 8),
        (0.1, None, 10, 1),
        ("2.5", None, 4, 10),
        (None, 1368, 512, 1368),
    ],
)
def test_the_hidden_width_is_exact(
    width: float | str | None, d_ff: int | None, d_model: int, expected: int
) -> None:
    assert FFNDesign(width=width, d_ff=d_ff).hidden_width(d_model) == expected


@pytest.mark.parametrize("width", ["8/3", 2.67])
def test_a_product_that_is_not_whole_names_both_keys_and_a_mend(width: float | str) -> None:
    with pytest.raises(
        ConfigError, match=rf"ffn\.width={width} and model\.d_model=128, product 341\..*d_ff=34[12]"
    ):
        FFNDesign(width=width).hidden_width(128)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 4, "d_ff": 512}, r"ffn\.width=4 and ffn\.d_ff=512"),
        ({"width": None}, r"ffn\.width and ffn\.d_ff .*both are null"),
        ({"width": 0}, r"ffn\.width must be a positive number"),
        ({"width": "wide"}, r"ffn\.width must be a positive number or a fraction such as 8/3"),
        ({"width": "1/0"}, r"ffn\.width must be a positive number"),
        ({"width": float("inf")}, r"ffn\.width must be a positive number"),
        ({"width": None, "d_ff": 0}, r"ffn\.d_ff must be a whole number of at least 1"),
        ({"constraint": "spectral"}, r"ffn\.constraint .*Did you mean 'spectral_norm'"),
    ],
)
def test_bad_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FFNDesign(**values)
