"""From configuration to network: the presets' sizes, the closed form, and errors that name keys."""

from collections import Counter
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from omegaconf import OmegaConf

from nerve.errors import ConfigError
from nerve.measuring.ffns import n_inputs, sites_of
from nerve.measuring.find import find_ffns
from nerve.models import MODELS, Skeleton, build_model, model_design
from nerve.models.build import FACTORS
from nerve.models.gpt import GPT
from nerve.models.mixer import Mixer
from nerve.nn.activation import ACTIVATIONS
from nerve.nn.constraint import CONSTRAINTS
from nerve.nn.normalization import NORMS, WIRINGS
from nerve.nn.position import POSITIONS
from nerve.optim import parameter_roles

CONF = Path(__file__).parents[2] / "conf"

GPT_VALUES: dict[str, Any] = {
    "model": {"kind": "gpt", "n_layers": 2, "d_model": 8, "n_heads": 2, "seq_len": 6},
    "normalization": {"kind": "rmsnorm"},
    "activation": {"name": "relu"},
    "position": {"name": "rope"},
    "ffn": {"width": 2, "gated": True},
}
MIXER_VALUES: dict[str, Any] = {
    **GPT_VALUES,
    "model": {
        "kind": "mixer",
        "n_layers": 2,
        "d_model": 8,
        "patch_size": 2,
        "token_mixing": {"activation": "silu", "width": None, "d_ff": 5},
        "channel_mixing": {"activation": None, "width": None, "d_ff": None},
    },
    "position": {"name": "none"},
}
IMAGES = {"image_size": 4, "n_channels": 1, "n_classes": 3}


def composed(*overrides: str) -> dict[str, Any]:
    """The groups that a network is built from, as the command line composes them."""
    config = support.composed(*overrides)
    groups = ("model", "normalization", "activation", "position", "ffn")
    return {name: OmegaConf.to_container(config[name], resolve=True) for name in groups}


def n_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def closed_form(values: dict[str, Any], vocab_size: int) -> int:
    """The number of parameters of a GPT, derived on paper."""
    model, ffn = values["model"], values["ffn"]
    d, n_layers = model["d_model"], model["n_layers"]
    d_ff = ffn["d_ff"] or ffn["width"] * d
    norm = {"layernorm": 2 * d, "rmsnorm": d}[values["normalization"]["kind"]]
    attention = 4 * d * d + 4 * d * model["attention_bias"]
    n_ups = 2 if ffn["gated"] else 1
    feed_forward = (n_ups + 1) * d * d_ff + (n_ups * d_ff + d) * ffn["bias"]
    positions = model["seq_len"] * d * (values["position"]["name"] == "learned")
    embeddings = vocab_size * d * (1 if model["tie_embeddings"] else 2)
    return embeddings + positions + n_layers * (attention + feed_forward + 2 * norm) + norm


@pytest.mark.parametrize(
    ("preset", "vocab_size", "millions"),
    [
        ("gpt_tiny", 1024, 1.1),
        ("gpt_mini", 1024, 3.1),
        ("gpt2_125m", 50257, 124.4),
        ("gpt2_350m", 50257, 354.8),
        ("llama_71m", 32000, 70.6),
        ("llama_130m", 32000, 134.1),
        ("llama_1b", 32000, 1339.1),
    ],
)
def test_gpt_presets_have_the_sizes_that_they_announce(
    preset: str, vocab_size: int, millions: float
) -> None:
    values = composed(f"model={preset}")
    with torch.device("meta"):
        model = build_model(values, seed=0, vocab_size=vocab_size)
    assert n_parameters(model) == closed_form(values, vocab_size)
    skeleton = Skeleton.of(model_design(values, vocab_size=vocab_size))
    assert skeleton.n_parameters == n_parameters(model)
    assert round(n_parameters(model) / 1e6, 1) == millions


def test_mixer_presets_have_the_sizes_that_they_announce() -> None:
    values = composed("model=mixer_b16")
    size = support.composed("model=mixer_b16").data.image_size
    with torch.device("meta"):
        b16 = build_model(values, seed=0, image_size=size, n_channels=3, n_classes=1000)
        b4 = build_model(
            composed("model=mixer_b4"), seed=0, image_size=32, n_channels=3, n_classes=100
        )
        tiny = build_model(
            composed("model=mixer_tiny"), seed=0, image_size=8, n_channels=1, n_classes=10
        )
    assert round(n_parameters(b16) / 1e6, 1) == 59.9
    assert round(n_parameters(tiny) / 1e6, 2) == 0.09
    assert b16.blocks[0].token_mixing.up.weight.shape == (384, 196)
    assert b4.blocks[0].token_mixing.up.weight.shape == (384, 64)
    assert b16.blocks[0].channel_mixing.up.weight.shape == (3072, 768)


LEAKY = {"name": "learnable_leaky_relu", "shared": True}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "normalization": [
        *({"kind": kind} for kind in NORMS),
        *({"placement": placement} for placement in WIRINGS),
        {"placement": "mix", "n_post_layers": 2},
        {"final": False, "eps": 1e-3},
    ],
    "activation": [
        *({"name": name} for name in ACTIVATIONS),
        LEAKY | {"negative_slope": 0.1},
        {"name": "interpolated", "base": "relu", "alpha": 0.1},
    ],
    "position": [*({"name": name} for name in POSITIONS), {"name": "rope", "theta": 100.0}],
    "ffn": [
        *({"constraint": constraint} for constraint in CONSTRAINTS),
        {"width": None, "d_ff": 5},
        {"gated": False},
        {"bias": False},
    ],
    "model": [
        {"tie_embeddings": False, "attention_bias": False, "scale_residual_init": False},
        {"dropout": 0.1, "init_std": 0.1, "pre_std": 1},
        {"n_layers": 5, "d_model": 4, "n_heads": 1, "seq_len": 3},
    ],
}
"""Every value of a design of a GPT, and every option of a factor."""
MIXER_CHANGES: dict[str, list[dict[str, Any]]] = {
    **{group: CHANGES[group] for group in ("normalization", "activation", "ffn")},
    "position": [{"name": "none", "theta": 10_000.0}],
    "model": [
        {"dropout": 0.1, "init_std": 0.1, "pre_std": 1},
        {"n_layers": 5, "d_model": 4, "patch_size": 1},
        {"token_mixing": {"activation": "relu"}, "channel_mixing": {"width": 1}},
    ],
}


@pytest.mark.parametrize("n_layers", [1, 2, 3, 7])
@pytest.mark.parametrize("base", [GPT_VALUES, MIXER_VALUES])
def test_a_skeleton_has_the_parameters_of_the_whole_network(base: dict, n_layers: int) -> None:
    """Each shape in each role as often as in the network, whatever blocks share, and the same
    FFNs."""
    for changed in ({}, LEAKY):
        check_skeleton({**deepcopy(base), "activation": base["activation"] | changed}, n_layers)


@pytest.mark.parametrize(
    ("base", "changes"), [(GPT_VALUES, CHANGES), (MIXER_VALUES, MIXER_CHANGES)]
)
def test_each_value_of_a_design_is_in_the_skeleton(base: dict, changes: dict) -> None:
    """A new value or option must be tried here: it may make blocks share weights, or differ."""
    design = MODELS[base["model"]["kind"]].Config
    for group, cls in {**FACTORS, "model": design}.items():
        known = {each.name for each in fields(cls)} - FACTORS.keys() - IMAGES.keys()
        tried = {name for change in changes[group] for name in change}
        assert known - {"vocab_size"} == tried
        for change in changes[group]:
            check_skeleton({**deepcopy(base), group: base[group] | change}, 5)


def check_skeleton(values: dict[str, Any], n_layers: int) -> None:
    values["model"]["n_layers"] = n_layers
    data_dims = {"vocab_size": 11} if values["model"]["kind"] == "gpt" else IMAGES
    design = model_design(values, **data_dims)
    with torch.device("meta"):
        network = MODELS[values["model"]["kind"]](design)
    roles = parameter_roles(network)
    expected = Counter((roles[name], each.shape) for name, each in network.named_parameters())
    skeleton = Skeleton.of(design)
    roles = parameter_roles(skeleton.network)
    found: Counter = Counter()
    for name, parameter, n_alike in skeleton.parameters():
        found[roles[name], parameter.shape] += n_alike
    assert +found == expected
    assert all(parameter.is_meta for _, parameter, _ in skeleton.parameters())
    assert [
        (ffn.layer, ffn.name, n_inputs(sites_of(ffn)[0]), sites_of(ffn)[1].width)
        for ffn in find_ffns(network)
    ] == [
        (layer, name, *design.ffn_widths(name)) for layer in range(n_layers) for name in design.FFNS
    ]


def test_a_skeleton_of_layers_with_two_placements_is_that_of_one() -> None:
    """Norms have the same parameters in both placements; the number of PostLN layers is checked."""
    values = deepcopy(GPT_VALUES)
    values["model"]["n_layers"] = 7
    plain = Skeleton.of(model_design(values, vocab_size=11))
    values["normalization"] |= {"placement": "mix", "n_post_layers": 6}
    assert Skeleton.of(model_design(values, vocab_size=11)).n_parameters == plain.n_parameters
    values["normalization"]["n_post_layers"] = 7
    with pytest.raises(ConfigError, match=r"between 1 and model\.n_layers - 1.*got 7 of .*=7"):
        model_design(values, vocab_size=11)


def test_the_command_line_beats_the_factors_of_a_preset() -> None:
    preset = composed("model=llama_71m")
    assert preset["normalization"]["kind"] == "rmsnorm"
    assert (preset["activation"]["name"], preset["position"]["name"]) == ("silu", "rope")
    values = composed("normalization=postln", "activation=relu", "model=llama_71m", "ffn.bias=true")
    assert (values["normalization"]["kind"], values["normalization"]["placement"]) == (
        "layernorm",
        "post",
    )
    assert (values["activation"]["name"], values["position"]["name"]) == ("relu", "rope")
    assert values["ffn"]["bias"] is True


def test_every_option_of_every_factor_builds() -> None:
    """The groups are cycled through in parallel, repeating the shorter ones."""
    groups = ("normalization", "activation", "position", "ffn")
    options = {group: [file.stem for file in (CONF / group).glob("*.yaml")] for group in groups}
    for i in range(max(len(names) for names in options.values())):
        values = composed(*(f"{group}={names[i % len(names)]}" for group, names in options.items()))
        with torch.device("meta"):
            model = build_model(values, seed=0, vocab_size=64)
        assert isinstance(model, GPT)
        for group in ("normalization", "activation", "position", "ffn"):
            built = vars(getattr(model.config, group))
            assert {key: built[key] for key in built.keys() & values[group].keys()} == {
                key: value for key, value in values[group].items() if key in built
            }
            assert built.keys() & values[group].keys()


def test_values_reach_the_network() -> None:
    model = build_model(GPT_VALUES, seed=0, vocab_size=11)
    assert isinstance(model, GPT)
    assert model.config.ffn.gated
    assert model.config.normalization.kind == "rmsnorm"
    assert model(torch.zeros(1, 6, dtype=torch.long)).shape == (1, 6, 11)
    mixer = build_model(MIXER_VALUES, seed=0, **IMAGES)
    assert isinstance(mixer, Mixer)
    assert isinstance(mixer.blocks[1].token_mixing.act, torch.nn.SiLU)
    assert isinstance(mixer.blocks[1].channel_mixing.act, torch.nn.ReLU)
    assert mixer.blocks[0].token_mixing.up.weight.shape == (5, 4)
    assert mixer(torch.zeros(2, 1, 4, 4)).shape == (2, 3)


def test_the_seed_reaches_the_weights() -> None:
    first, again, other = (build_model(GPT_VALUES, seed=s, vocab_size=11) for s in (1, 1, 2))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_the_configuration_is_not_changed() -> None:
    for values, data_dims in ((GPT_VALUES, {"vocab_size": 11}), (MIXER_VALUES, IMAGES)):
        before = deepcopy(values)
        build_model(values, seed=0, **data_dims)
        assert values == before


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("model", {"kind": "gtp"}, r"model\.kind must be one of gpt, mixer; got 'gtp'"),
        ("model", {"n_layer": 2}, r"a key of model must be .*Did you mean 'n_layers'"),
        ("model", {"patch_size": 2}, r"a key of model must be one of .*got 'patch_size'"),
        ("ffn", {"widht": 2}, r"a key of ffn must be .*Did you mean 'width'"),
        ("normalization", {"placement": "before"}, r"normalization\.placement must be one of"),
    ],
)
def test_a_bad_key_or_value_is_named(group: str, values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model({**GPT_VALUES, group: {**GPT_VALUES[group], **values}}, seed=0, vocab_size=11)


def test_a_bad_key_of_a_mixing_is_named_with_its_place() -> None:
    values = deepcopy(MIXER_VALUES)
    values["model"]["token_mixing"]["gated"] = True
    with pytest.raises(ConfigError, match=r"a key of model\.token_mixing must be one of .*'gated'"):
        build_model(values, seed=0, **IMAGES)


def test_data_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.kind=gpt .*vocab_size.*has image_size"):
        build_model(GPT_VALUES, seed=0, **IMAGES)
    with pytest.raises(ConfigError, match=r"model\.kind=mixer .*n_classes.*has vocab_size"):
        build_model(MIXER_VALUES, seed=0, vocab_size=11)


def test_every_kind_has_a_preset() -> None:
    kinds = {
        OmegaConf.select(OmegaConf.load(file), "kind")
        or OmegaConf.select(OmegaConf.load(file), "model.kind")
        for file in (CONF / "model").glob("*.yaml")
    }
    assert kinds == set(MODELS)
