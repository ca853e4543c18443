"""Models of transformers are found without help, and measured as by hooks written by hand."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import nerve
from nerve.measuring.measure import frame_of
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe

transformers.logging.set_verbosity_error()

D, FF, VOCAB, T = 16, 40, 32, 7


class Family(NamedTuple):
    """A model and where its FFNs are, written down by hand.

    Attributes:
        auto: the class of transformers that makes a model of a configuration.
        config: its values.
        hand: the model to `(module, "output" | "input" | part)` of pre and of post, FFN by FFN.
    """

    auto: str
    config: Callable[[], Any]
    hand: Callable[[nn.Module], list[tuple[nn.Module, slice, nn.Module]]]


ALL = slice(None)
NO_PADDING = ("vit", True)


def config(name: str, **values: Any) -> Callable[[], Any]:
    usual = {
        "hidden_size": D,
        "intermediate_size": FF,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return lambda: getattr(transformers, name)(**(usual | values))


def mlps(layers: str, pre: str, post: str, part: slice = ALL):
    def hand(model: nn.Module) -> list[tuple[nn.Module, slice, nn.Module]]:
        return [
            (block.get_submodule(pre), part, block.get_submodule(post))
            for block in model.get_submodule(layers)
        ]

    return hand


def llama_like(name: str, **values: Any) -> Family:
    values = {"num_key_value_heads": 1, "head_dim": 8} | values
    hand = mlps("layers", "mlp.gate_proj", "mlp.down_proj")
    return Family("AutoModel", config(name, **values), hand)


def t5(model: nn.Module) -> list[tuple[nn.Module, slice, nn.Module]]:
    blocks = zip(model.encoder.block, model.decoder.block, strict=True)
    ffns = [block.layer[-1].DenseReluDense for pair in blocks for block in pair]
    return [(ffn.get_submodule(model.up), ALL, ffn.wo) for ffn in ffns]


gpt2_like = {"n_embd": D, "n_inner": FF, "n_layer": 2, "n_head": 2, "n_positions": 32}
FAMILIES = {
    "gpt2": Family(
        "AutoModel", config("GPT2Config", **gpt2_like), mlps("h", "mlp.c_fc", "mlp.c_proj")
    ),
    "llama": llama_like("LlamaConfig"),
    "mistral": llama_like("MistralConfig"),
    "qwen2": llama_like("Qwen2Config"),
    "qwen3": llama_like("Qwen3Config", head_dim=16),
    "olmo2": llama_like("Olmo2Config"),
    "gemma2": llama_like("Gemma2Config"),
    "gemma3": llama_like("Gemma3TextConfig"),
    "gpt_neox": Family(
        "AutoModel",
        config("GPTNeoXConfig"),
        mlps("layers", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "falcon": Family(
        "AutoModel",
        config("FalconConfig", ffn_hidden_size=FF),
        mlps("h", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "bloom": Family(
        "AutoModel",
        config("BloomConfig", n_layer=2, n_head=2),
        mlps("h", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    "gptj": Family(
        "AutoModel",
        config("GPTJConfig", rotary_dim=4, **gpt2_like),
        mlps("h", "mlp.fc_in", "mlp.fc_out"),
    ),
    "phi": Family("AutoModel", config("PhiConfig"), mlps("layers", "mlp.fc1", "mlp.fc2")),
    "phi3": Family(
        "AutoModel",
        config("Phi3Config"),
        mlps("layers", "mlp.gate_up_proj", "mlp.down_proj", slice(0, FF)),
    ),
    "gpt_bigcode": Family(
        "AutoModel", config("GPTBigCodeConfig", **gpt2_like), mlps("h", "mlp.c_fc", "mlp.c_proj")
    ),
    "bert": Family(
        "AutoModelForMaskedLM",
        config("BertConfig"),
        mlps("bert.encoder.layer", "intermediate.dense", "output.dense"),
    ),
    "modernbert": Family(
        "AutoModel",
        config("ModernBertConfig", cls_token_id=1, sep_token_id=2),
        mlps("layers", "mlp.Wi", "mlp.Wo", slice(0, FF)),
    ),
    "opt": Family(
        "AutoModel",
        config("OPTConfig", ffn_dim=FF, word_embed_proj_dim=D),
        mlps("decoder.layers", "fc1", "fc2"),
    ),
    "albert": Family(
        "AutoModel",
        config("AlbertConfig", embedding_size=8, num_hidden_layers=3),
        lambda model: [
            (layer.ffn, ALL, layer.ffn_output)
            for layer in model.encoder.albert_layer_groups[0].albert_layers
        ],
    ),
    "t5": Family(
        "AutoModel",
        config("T5Config", d_model=D, d_kv=8, d_ff=FF, num_layers=2, num_heads=2),
        t5,
    ),
    "t5 gated": Family(
        "AutoModel",
        config(
            "T5Config",
            d_model=D,
            d_kv=8,
            d_ff=FF,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        ),
        t5,
    ),
    # The two that were added when the finder was finished, at the tag finder-finished.
    "codegen": Family(
        "AutoModel",
        config("CodeGenConfig", rotary_dim=4, **gpt2_like),
        mlps("h", "mlp.fc_in", "mlp.fc_out"),
    ),
    "apertus": Family(
        "AutoModel",
        config("ApertusConfig", num_key_value_heads=1),
        mlps("layers", "mlp.up_proj", "mlp.down_proj"),
    ),
    "vit": Family(
        "AutoModel",
        config("ViTConfig", image_size=8, patch_size=4, num_channels=3),
        lambda model: vit(model),
    ),
}


def vit(model: nn.Module) -> list[tuple[nn.Module, slice, nn.Module]]:
    fitting = [m for m in model.modules() if isinstance(m, nn.Linear) and FF in m.weight.shape]
    return [(up, ALL, down) for up, down in zip(fitting[::2], fitting[1::2], strict=True)]


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, family.auto).from_config(family.config())
    model.up = "wi_0" if "gated" in name else "wi"  # of T5, for the table above
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def batch(name: str, *, padded: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(5, 3, 8, 8, generator=generator).double()}
    ids = torch.randint(3, VOCAB, (5, T), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name.startswith("t5"):
        given["decoder_input_ids"] = ids.flip(1)
        given["decoder_attention_mask"] = torch.ones_like(ids)
    if padded:
        for row, n_tokens in enumerate((T, 3, 5, T, 2)):
            given["attention_mask"][row, n_tokens:] = 0
            if "decoder_attention_mask" in given:
                given["decoder_attention_mask"][row, T - row :] = 0
    return given


def by_hand(name: str, model: nn.Module, given: dict[str, Tensor]) -> list[dict[str, float]]:
    """The values of each FFN from features that hooks written by hand keep."""
    places = FAMILIES[name].hand(model)
    kept: dict[tuple[int, str], list[Tensor]] = {}
    handles = []
    for index, (up, part, down) in enumerate(places):

        def keep_pre(module, args, output, index=index, part=part):
            kept.setdefault((index, "pre"), []).append(output[..., part])

        def keep_post(module, args, index=index):
            kept.setdefault((index, "post"), []).append(args[0])

        handles += [up.register_forward_hook(keep_pre), down.register_forward_pre_hook(keep_post)]
    with torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    values = []
    for index in range(len(places)):
        is_decoder = name.startswith("t5") and index % 2
        mask = given.get("decoder_attention_mask" if is_decoder else "attention_mask")
        row: dict[str, float] = {}
        for site in ("pre", "post"):
            runs = [x.reshape(-1, x.shape[-1]) for x in kept[index, site]]
            counts = slice(None) if mask is None else mask.reshape(-1).bool()
            row |= oracle(torch.cat([x[counts] for x in runs]).double().numpy(), site)
        values.append(row)
    return values


def oracle(x: np.ndarray, site: str) -> dict[str, float]:
    spectrum = np.linalg.eigvalsh(np.cov(x.astype(np.float64).T)).clip(0)
    p = spectrum / spectrum.sum()
    return {
        "n_samples": len(x),
        f"pr_{site}": 1 / np.square(p).sum(),
        f"se_{site}": -sum(v * math.log(v) for v in p if v > 0),
        f"variance_{site}": spectrum.sum(),
    }


def assert_same(rows: Any, expected: list[dict[str, float]], rel: float = 1e-6) -> None:
    assert len(rows) == len(expected)
    assert rows["status"].tolist() == ["ok"] * len(rows)
    for row, values in zip(rows.to_dict("records"), expected, strict=True):
        for column, value in values.items():
            assert row[column] == pytest.approx(value, rel=rel), column


@pytest.mark.parametrize(
    ("name", "padded"),
    [case for case in itertools.product(FAMILIES, (False, True)) if case != NO_PADDING],
)
def test_a_family_is_found_and_measured_as_by_hand(name, padded):
    """All values to 1e-6 of float64 NumPy; padding does not count in any stream."""
    model, given = build(name), batch(name, padded=padded)
    assert_same(nerve.measure(model, [given]), by_hand(name, model, given))


def renamed(model: nn.Module) -> nn.Module:
    """The model with renamed modules, which their parents still find."""
    generator = torch.Generator().manual_seed(0)
    for module in list(model.modules()):
        children = dict(module._modules)
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            continue
        aliases = {
            name: f"m{int(torch.randint(10**9, (), generator=generator))}" for name in children
        }
        module._modules = {aliases[name]: child for name, child in children.items()}
        for name, child in children.items():
            object.__setattr__(module, name, child)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_names_do_not_matter(name):
    """With all modules renamed at random, the rows are the same apart from names."""
    given = batch(name, padded=name != "vit")
    expected = nerve.measure(build(name), [given])
    got = nerve.measure(renamed(build(name)), [given])
    columns = [column for column in expected if column != "ffn"]
    assert got[columns].equals(expected[columns])


HALF = ["gpt2", "llama", "gemma2", "olmo2", "gpt_neox", "bloom", "falcon", "phi3", "bert"]
HALF += ["modernbert", "opt", "albert", "t5 gated"]


@pytest.mark.parametrize("name", HALF)
def test_a_family_in_bfloat16_is_measured_as_it_runs(name):
    """The features as rounded to 16 bits, to the precision of float32 products."""
    model, given = build(name, torch.bfloat16), batch(name, padded=True)
    assert_same(nerve.measure(model, [given]), by_hand(name, model, given), rel=1e-4)


def assert_measured_compiled(name: str) -> None:
    """In float64, compiled code taps what hooks by hand see uncompiled. In bfloat16, where compiled
    code rounds less often, `nerve.measure` runs the model uncompiled."""
    model, given = build(name), batch(name, padded=False)
    ffns = nerve.find_ffns(model, given)
    expected = by_hand(name, model, given)
    probe = Probe(ffns)
    measurement = Measurement(probe)
    probe.install()
    try:
        compiled = torch.compile(model, backend="aot_eager")
        with torch.no_grad():
            measurement.start()
            compiled(**given)
            measurement.finish_forward()
            measurement.stop()
    finally:
        probe.remove()
    assert_same(frame_of(measurement.spectra()), expected)
    half, given = build(name, torch.bfloat16), batch(name, padded=True)
    compiled = torch.compile(half, backend="aot_eager")
    with torch.no_grad():
        compiled(**given)
    assert_same(nerve.measure(compiled, [given]), by_hand(name, half, given), rel=1e-4)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_compiled_family_is_found_and_measured(fresh_compiler):
    assert_measured_compiled("llama")


# Tracing an autograd.Function, as BLOOM's GELU is one, torch's compiler warns of its own doing.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_each_family_compiled_is_found_and_measured(name, fresh_compiler):
    assert_measured_compiled(name)
