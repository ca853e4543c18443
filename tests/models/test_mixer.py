"""The MLP-Mixer against one written out by hand, its two FFNs, and invalid values."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nerve.errors import ConfigError
from nerve.models.mixer import Mixer, MixerConfig, Mixing, patches
from nerve.nn.activation import Activation
from nerve.nn.ffn import FFNDesign
from nerve.nn.normalization import Normalization
from nerve.nn.position import Position

TINY = MixerConfig(
    n_layers=2, d_model=8, patch_size=2, image_size=6, n_channels=3, n_classes=5, init_std=0.3
)


def some_images(batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(
        batch, TINY.n_channels, TINY.image_size, TINY.image_size, generator=generator
    )


def test_patches_and_their_embedding_are_a_convolution_with_that_stride() -> None:
    model, images = Mixer(TINY), some_images()
    kernel = model.patch_embedding.weight.view(8, 3, 2, 2)
    expected = F.conv2d(images, kernel, model.patch_embedding.bias, stride=2)
    actual = model.patch_embedding(patches(images, 2))
    torch.testing.assert_close(actual, expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_the_mixer_is_what_its_paper_writes_down(placement: str) -> None:
    model, images = (
        Mixer(replace(TINY, normalization=Normalization(placement=placement))),
        some_images(),
    )
    x = model.patch_embedding(patches(images, 2))
    for block in model.blocks:
        token, channel = block.token_mixing, block.channel_mixing

        def over_patches(x: Tensor, ffn: torch.nn.Module = token) -> Tensor:
            hidden = F.gelu(torch.einsum("bpd,hp->bdh", x, ffn.up.weight) + ffn.up.bias)
            return torch.einsum("bdh,ph->bpd", hidden, ffn.down.weight) + ffn.down.bias[:, None]

        def over_channels(x: Tensor, ffn: torch.nn.Module = channel) -> Tensor:
            hidden = F.gelu(torch.einsum("bpd,hd->bph", x, ffn.up.weight) + ffn.up.bias)
            return torch.einsum("bph,dh->bpd", hidden, ffn.down.weight) + ffn.down.bias

        if placement == "pre":
            x = x + over_patches(block.token_norm(x))
            x = x + over_channels(block.channel_norm(x))
        else:
            x = block.token_norm(x + over_patches(x))
            x = block.channel_norm(x + over_channels(x))
    expected = model.norm(x).mean(1) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(images), expected)


def test_samples_are_images_times_channels_and_images_times_patches() -> None:
    model = Mixer(replace(TINY, token_mixing=Mixing(d_ff=7), channel_mixing=Mixing(width=2)))
    shapes: dict[tuple[int, str], torch.Size] = {}
    for block in model.blocks:
        for ffn in (block.token_mixing, block.channel_mixing):
            key = (ffn.layer, ffn.name)
            ffn.pre.register_forward_hook(
                lambda module, args, output, key=key: shapes.update({key: output.shape})
            )
    model(some_images(batch=4))
    for layer in range(2):
        assert shapes[layer, "token_mixing"] == (4, 8, 7)
        assert shapes[layer, "channel_mixing"] == (4, 9, 16)


def test_each_mixing_has_its_own_activation_and_width_or_the_factors() -> None:
    config = replace(
        TINY,
        activation=Activation("leaky_relu", negative_slope=0.2),
        ffn=FFNDesign(width=3),
        token_mixing=Mixing(activation="relu", width=0.5),
    )
    block = Mixer(config).blocks[0]
    assert isinstance(block.token_mixing.act, torch.nn.ReLU)
    assert block.channel_mixing.act.negative_slope == 0.2
    assert block.token_mixing.up.weight.shape == (4, 9)
    assert block.channel_mixing.up.weight.shape == (24, 8)


def test_the_factor_ffn_shapes_both_mixings() -> None:
    design = FFNDesign(gated=True, bias=False, constraint="hyperspherical")
    model = Mixer(replace(TINY, ffn=design, token_mixing=Mixing(d_ff=7)))
    for block in model.blocks:
        for ffn in (block.token_mixing, block.channel_mixing):
            for matrix in (ffn.up, ffn.gate, ffn.down):
                assert matrix.bias is None
                torch.testing.assert_close(
                    matrix.weight.norm(dim=1), torch.ones(len(matrix.weight))
                )
    model(some_images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_shared_slope_is_one_for_each_mixing() -> None:
    model = Mixer(replace(TINY, activation=Activation("learnable_leaky_relu", shared=True)))
    slopes = [name for name, _ in model.named_parameters() if "slope" in name]
    assert slopes == ["blocks.0.token_mixing.act.slope", "blocks.0.channel_mixing.act.slope"]


def test_initial_weights_come_from_the_seed_alone_and_a_saved_state_gives_the_same_network() -> (
    None
):
    state = torch.get_rng_state()
    first = Mixer(TINY, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    second, other = Mixer(TINY, seed=3), Mixer(TINY, seed=4)
    images = some_images()
    assert torch.equal(first(images), second(images))
    assert not torch.allclose(first(images), other(images))
    other.load_state_dict(first.state_dict())
    assert torch.equal(first(images), other(images))


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size.*\(3, 6, 6\); got \(1, 6, 6\)"):
        Mixer(TINY)(torch.zeros(2, 1, 6, 6))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 7}, r"data\.image_size=7 and model\.patch_size=2"),
        ({"n_classes": 0}, r"data\.n_classes must be a whole number of at least 1"),
        ({"position": Position("rope")}, r"model\.kind=mixer .*position\.name=rope"),
        ({"dropout": -0.1}, r"model\.dropout must lie in \[0, 1\)"),
        ({"init_std": 0.0}, r"model\.init_std must be positive"),
        (
            {"token_mixing": Mixing(width=2, d_ff=8)},
            r"model\.token_mixing\.width=2 and model\.token_mixing\.d_ff=8",
        ),
        (
            {"channel_mixing": Mixing(activation="gleu")},
            r"model\.channel_mixing\.activation must be one of .*'gelu'",
        ),
    ],
)
def test_bad_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **values)


def test_a_width_that_gives_no_whole_number_names_the_keys_of_its_mixing() -> None:
    with pytest.raises(ConfigError, match=r"model\.token_mixing\.width=0\.3 and model\.d_model=8"):
        Mixer(replace(TINY, token_mixing=Mixing(width=0.3)))
