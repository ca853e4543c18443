"""`nerve-probe`, as a user calls it: what `nerve.measure` measures, kept as a run."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from measuring.test_families import FAMILIES, build
from mixtures import model_of
from torch import nn
from trained import llama, nerve_probe, save, save_gguf, save_tokenizer, write_text

import nerve
from nerve.cli.probing.machine import device_of
from nerve.cli.probing.steps import steps_of
from nerve.data.files import text_files
from nerve.data.packing import PackedText, pack
from nerve.errors import ConfigError

OF_TOKENS = [name for name in FAMILIES if name != "vit"]
FEW = ("gpt2", "llama", "bert", "t5 gated", "opt")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(Path("text"))


def stored(directory: str | Path = "out") -> pd.DataFrame:
    return nerve.load_metrics(directory)


def packed_text(folder: Path, n: int, seq_len: int) -> PackedText:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return pack(text_files("text/*.txt"), tokenizer, seq_len=seq_len, n_sequences=n)


def batches_of(folder: Path, model: nn.Module, n: int, seq_len: int = 32) -> list[dict]:
    """What the command measures, put together by hand: a batch of four sequences each."""
    ids = torch.from_numpy(packed_text(folder, n, seq_len).sequences)
    parts = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]
    if model.config.is_encoder_decoder:
        parts = [part | {f"decoder_{key}": part[key] for key in part} for part in parts]
    return parts


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FEW else pytest.mark.slow) for n in OF_TOKENS]
)
def test_a_family_is_measured_as_in_python(name, tmp_path):
    """The rows of `nerve.measure` on the same tokens, of the model as it was before it was saved.
    Eight tokens for each unit of d_ff."""
    model = build(name)
    save(model, tmp_path / "model")
    status, out, err = nerve_probe("model", "--text", "text/*.txt", "-o", "out")
    assert status == 0, err
    assert "nerve-report out" in out
    d_ff = 64 if name == "bloom" else 40
    rows = nerve.measure(model, batches_of(tmp_path / "model", model, 8 * d_ff // 32))
    n_runs, got = 3 if name == "albert" else 1, stored()
    assert f"samples per unit of d_ff (N/D): {8.0 * n_runs}\n" in out
    columns = [each for each in rows if rows[each].dtype == float or each in ("layer", "ffn")]
    # Of a run texts are categories.
    same = {"check_dtype": False, "check_categorical": False}
    pd.testing.assert_frame_equal(got[columns], rows[columns], rtol=1e-10, **same)
    assert len(nerve.load_spectra("out")) == 2 * len(rows)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe"])
def test_the_experts_of_a_model_have_rows_of_their_own(family, tmp_path):
    """Those of `nerve.measure`, including an expert without tokens; N/D shows how few they have."""
    model = model_of(family)
    save(model, tmp_path / "model")
    status, out, err = nerve_probe("model", "--text", "text/*.txt", "-o", "out", "--n-tokens", 320)
    assert status == 0, err
    assert "\ntext: text_files:text/*.txt\n" in out
    assert "samples per unit of d_ff (N/D): 0.0 to " in out
    keys = ["layer", "ffn"]
    rows = nerve.measure(model, batches_of(tmp_path / "model", model, 10)).sort_values(keys)
    got = stored().sort_values(keys)
    assert {"experts", "expert_0", "expert_4"} <= set(got["ffn"])
    columns = [*keys, "n_samples", "pr_pre", "pr_post", "status"]
    pd.testing.assert_frame_equal(
        got[columns].reset_index(drop=True),
        rows[columns].reset_index(drop=True),
        rtol=1e-10,
        check_dtype=False,
        check_categorical=False,
    )


def test_columns_describe_the_model_and_rows_have_its_loss(tmp_path):
    """Columns named as in nerve-run, the loss of the same tokens, and a report that reads them."""
    model = llama()
    folder = save(model, tmp_path / "model")
    assert nerve_probe("model", "--text", "text/*.txt", "-o", "out", "--seq-len", 16)[0] == 0
    (run,) = nerve.load_runs("out").to_dict("records")
    expected = {
        "model.n_layers": 2,
        "model.d_model": 16,
        "model.kind": "llama",
        "activation.name": "silu",
        "normalization.kind": "rmsnorm",
        "ffn.d_ff": 40,
        "ffn.gated": True,
        "probe.seq_len": 16,
        "probe.dtype": "float64",
        "transformers.rms_norm_eps": 1e-6,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "run_status": "done",
        "step": 0,
        "unigram_loss": packed_text(folder, 20, 16).unigram_loss,
    }
    assert {name: run[name] for name in expected} == expected
    assert run["fingerprints.tokenizer"] == run["probe.tokenizer"]
    total, n_targets = 0.0, 0
    for batch in batches_of(folder, model, 20, 16):
        with torch.no_grad():
            p = model(**batch).logits[:, :-1].softmax(-1)
        total -= float(p.gather(-1, batch["input_ids"][:, 1:, None]).log().sum())
        n_targets += batch["input_ids"][:, 1:].numel()
    loss = total / n_targets
    assert stored()["val_loss"].tolist() == pytest.approx([loss, loss], rel=1e-12)
    assert run["final.val_loss"] == pytest.approx(loss, rel=1e-12)
    assert nerve.write_report("out", "page").is_file()


def test_a_massive_activation_is_flagged_and_left_out_with_the_first_tokens(tmp_path):
    """A planted direction that only the first position has, and that one feature reads."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=32)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        block = model.transformer.h[0]
        for embedding in (model.transformer.wte, model.transformer.wpe):
            embedding.weight[:, :2] = 0
        model.transformer.wpe.weight[0, :2] = torch.tensor([9.0, -9.0])
        block.attn.c_proj.weight.zero_()
        block.attn.c_proj.bias.zero_()
        block.ln_2.weight.fill_(1)
        block.ln_2.bias.zero_()
        block.mlp.c_fc.weight[:, 5] = 0
        block.mlp.c_fc.weight[:2, 5] = torch.tensor([50.0, -50.0])
    save(model, tmp_path / "model")
    status, out, _ = nerve_probe("model", "--text", "text/*.txt", "-o", "out", "--n-tokens", 640)
    assert status == 0
    assert "dominate the spectrum of post in layer 0 (ffn): the farthest sample holds" in out
    assert "--skip-first 1 excludes the first tokens" in out
    first = stored()
    assert "post" in first["outliers"][0]
    again = ("model", "--text", "text/*.txt", "-o", "without", "--n-tokens", 640)
    status, out, _ = nerve_probe(*again, "--skip-first", 1)
    assert "layer 0" not in out
    without = stored("without")
    assert without["outliers"][0] == ""
    assert without["n_samples"].tolist() == [20 * 31] * 2
    assert without["pr_post"][0] > 4 * first["pr_post"][0]


@pytest.mark.parametrize("place", ["model", "model/tiny.gguf"])
def test_a_gguf_file_is_a_model(place, tmp_path):
    """As a file or in its own folder, with the tokenizer that it contains."""
    model = llama(vocab_size=261)
    (tmp_path / "model").mkdir()
    save_gguf(model, tmp_path / "model" / "tiny.gguf")
    status, _, err = nerve_probe(place, "--text", "text/*.txt", "-o", "out", "--seq-len", 32)
    assert status == 0, err
    tokenizer = transformers.AutoTokenizer.from_pretrained("model", gguf_file="tiny.gguf")
    packed = pack(text_files("text/*.txt"), tokenizer, seq_len=32, n_sequences=10)
    batches = [{"input_ids": torch.from_numpy(packed.sequences)}]
    rows, got = nerve.measure(model, batches), stored()
    assert got["pr_post"].tolist() == pytest.approx(rows["pr_post"].tolist(), rel=1e-4)
    assert got["n_samples"].tolist() == [320, 320]


def test_groups_are_measured_as_in_python(tmp_path):
    """The rows that `nerve.measure` stores of the same groups and sites."""
    model = llama()
    folder = save(model, tmp_path / "model")
    groups = ["position", "frequency", "halves"]
    sites = ["stream_in", "output", "stream_out"]
    asked = ("--groups", ",".join(groups), "--sites", ",".join(sites), "--n-tokens", 320)
    status, _, err = nerve_probe("model", "--text", "text/*.txt", "-o", "out", *asked)
    assert status == 0, err
    nerve.measure(model, batches_of(folder, model, 10), into="by_hand", groups=groups, sites=sites)
    got, expected = (nerve.load_groups(each).drop(columns="run_id") for each in ("out", "by_hand"))
    pd.testing.assert_frame_equal(got, expected, rtol=1e-10)
    assert set(got["grouping"]) == {"all", *groups}
    assert set(got["site"]) == {"pre", "post", *sites}


def test_the_table_shows_what_would_be_measured_and_measures_nothing(tmp_path):
    llama().save_pretrained(tmp_path / "model")  # no tokenizer is needed for that
    status, out, _ = nerve_probe("model", "--list", "--layers", "1")
    assert status == 0
    assert out.splitlines()[0].split()[:5] == ["layer", "name", "pre", "post", "d_in"]
    (row,) = [line.split() for line in out.splitlines()[1:]]
    assert row[:4] == ["1", "ffn", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"]
    assert not Path("outputs").exists()


def test_which_ffns_and_how_many_tokens_can_be_chosen(tmp_path):
    save(llama(), tmp_path / "model")
    asked = ("--select", "*.mlp", "--layers", 1, "--n-tokens", 100, "--no-spectra")
    status, _, err = nerve_probe("model", "--text", "text/*.txt", "-o", "out", *asked)
    assert status == 0, err
    assert stored()[["layer", "n_samples"]].to_numpy().tolist() == [[1, 128]]
    with pytest.warns(nerve.IncompleteWarning, match="without spectra"):
        assert nerve.load_spectra("out").empty


def test_the_dtype_is_that_of_the_weights_or_the_requested_one(tmp_path):
    save(llama().to(torch.bfloat16), tmp_path / "model")
    for dtype in ((), ("--dtype", "float32")):
        assert nerve_probe("model", "--text", "text/*.txt", *dtype)[0] == 0
    assert sorted(nerve.load_runs("outputs")["probe.dtype"]) == ["bfloat16", "float32"]


def test_other_text_and_another_tokenizer_are_other_runs(tmp_path):
    """Each in its own directory; never in the same one."""
    save(llama(), tmp_path / "model")
    write_text(tmp_path / "other", seed=1)
    save_tokenizer(tmp_path / "reversed", " etaoinshrdlcumwfgypbvk"[::-1])
    for asked in (
        ("--text", "text/*.txt"),
        ("--text", "other/*.txt"),
        ("--text", "text/*.txt", "--tokenizer", "reversed"),
    ):
        assert nerve_probe("model", *asked)[0] == 0
        first = ("--text", "text/*.txt", "-o", "out")
        assert nerve_probe("model", *first)[0] == 0
        if asked != first[:2]:
            status, _, err = nerve_probe("model", *asked, "-o", "out")
            assert status == 1
            assert "A directory can hold only one run; out holds run" in err
            assert "Choose another directory with -o, or delete that one." in err
    with pytest.warns(nerve.FingerprintWarning):
        runs = nerve.load_runs("outputs")
    assert runs["config_id"].nunique() == 3
    assert len(nerve.load_runs("out")) == 1


def without_weights() -> str:
    llama().save_pretrained("model")
    Path("model/model.safetensors").unlink()
    return "has config.json and no weights"


def with_part_of_its_weights() -> str:
    from safetensors.torch import load_file, save_file

    save(llama(), Path("model"))
    weights = load_file("model/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    return "model lacks model.layers.1.mlp.up_proj.weight"


def with_damaged_weights() -> str:
    save(llama(), Path("model"))
    Path("model/model.safetensors").write_bytes(b"\0" * 64)
    return "model cannot be read by transformers"


def of_an_unknown_architecture() -> str:
    save(llama(), Path("model"))
    Path("model/config.json").write_text(json.dumps({"model_type": "mamba9"}))
    return "cannot be read by transformers"


def of_images() -> str:
    build("vit").save_pretrained("model")
    return "ViTModel takes pixel_values, not tokens"


def without_a_tokenizer() -> str:
    llama().save_pretrained("model")
    return "Text needs the model's tokenizer; model has none"


def with_a_tokenizer_that_is_made_up() -> str:
    build("bert").save_pretrained("model")  # of which transformers makes one without letters
    return "100% of it is unknown"


def with_the_tokenizer_of_another() -> str:
    save(llama(vocab_size=8), Path("model"))
    return "and the model embeds 8"


def with_little_text() -> str:
    save(llama(), Path("model"))
    write_text(Path("text"), n_letters=90)
    return "320 tokens; text_files:text/*.txt has 96"


def a_folder_of_checkpoints() -> str:
    save(llama(), Path("model/step_1"))
    return "model has neither. Its checkpoints: 'model/*'"


def an_empty_folder() -> str:
    Path("model").mkdir()
    return "a run directory run.json; model has neither"


@pytest.mark.parametrize(
    "make",
    [
        without_weights,
        with_part_of_its_weights,
        with_damaged_weights,
        of_an_unknown_architecture,
        of_images,
        without_a_tokenizer,
        with_a_tokenizer_that_is_made_up,
        with_the_tokenizer_of_another,
        with_little_text,
        a_folder_of_checkpoints,
        an_empty_folder,
    ],
)
def test_a_model_that_cannot_be_probed_gives_one_message(make):
    words = make()
    status, out, err = nerve_probe("model", "--text", "text/*.txt")
    assert (status, out) == (1, "")
    (message,) = [line for line in err.splitlines() if line.startswith("nerve-probe: ")]
    assert words in message
    assert "Traceback" not in err
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["./nowhere"], "there is no ./nowhere"),
        (["nothing/step_*"], "matches nothing here"),
        (["text/0.txt"], "is another file"),
        (["model", "--seq-len", "64"], "the positions of the model, 32; got 64"),
        (["model", "--seq-len", "1"], "--seq-len must be a whole number of at least 2"),
        (["model", "--n-tokens", "0"], "--n-tokens must be a whole number of at least 1; got 0"),
        (["model", "--batch-size", "0"], "--batch-size must be a whole number of at least 1"),
        (["model", "--skip-first", "-1"], "--skip-first must be a whole number of at least 0"),
        (["model", "--device", "abacus"], "--device must be a device of this machine"),
        (["model", "--groups", "place"], "--groups"),
        (["model", "--dtype", "float"], "--dtype must be one of float32, bfloat16"),
        (
            ["model", "--layers", "7"],
            "Layers to measure must be among those with FFNs, 0, 1; got 7",
        ),
        (["model/nope"], "the folder model exists, and has no nope"),
        (["model", "--skip-first", "32"], "--skip-first=32 of --seq-len=32"),
        (["model", "--select", "x"], "matches 'x'. Some of its paths: "),
        (["model", "--select", "*.mlp.up_proj"], "that matches select='*.mlp.up_proj'"),
        (["model", "--text", "gone.txt"], "gone.txt' matches none"),
        (["model", "--steps", "1,2"], "got 2 for 1: model"),
    ],
)
def test_invalid_arguments_give_one_message(asked, words, tmp_path):
    save(llama(), tmp_path / "model")
    status, out, err = nerve_probe(*asked)
    assert (status, out) == (1, "")
    assert words in err
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["ckpt/step_0", "ckpt/step_1000"], [0, 1000]),
        (["out/checkpoint-500/", "out/checkpoint-1500"], [500, 1500]),
        (["step-000000000040.ckpt"], [40]),
        (["x/iter_007", "x/iter_8"], [7, 8]),
        (["o/pythia@step1000", "o/pythia@step3000"], [1000, 3000]),
        (["a/step1000-tokens4B", "a/step2000-tokens8B"], [1000, 2000]),
        (["runs/0", "runs/25"], [0, 25]),
        (["w2-10", "w2-20"], [10, 20]),
        (["step_10best", "step_20.ckpt"], [10, 20]),
        (["llama-7b-100", "llama-7b-200"], [100, 200]),
        (["pythia-70m"], [0]),
        (["gpt2"], [0]),
        (["150"], [150]),
    ],
)
def test_steps_come_from_names(names, steps):
    assert steps_of(names, None) == steps
    assert steps_of(names, range(len(names))) == [*range(len(names))]


@pytest.mark.parametrize(
    ("names", "given", "words"),
    [
        (["first", "second_2"], None, "first contains none"),
        (["step_10k", "step_20k"], None, "plain number, as in step_100; got step_10k"),
        (["step_1.5M", "step_2.5M"], None, "plain number, as in step_100; got step_1.5M"),
        (["step_1e6"], None, "plain number, as in step_100; got step_1e6"),
        (["step-1,000"], None, "plain number, as in step_100; got step-1,000"),
        (["o/pythia-70m@step1000", "o/pythia-70m"], None, "plain number, .* got o/pythia-70m"),
        (["model-10k", "model-20k"], None, "plain number, as in step_100; got model-10k"),
        (["a/step_1", "b/step_1"], None, "both have step 1"),
        (["step_1", "step_2"], [5], "got 1 for 2"),
        (["step_1", "step_2"], [5, 5], "both have step 5"),
        (["step_1", "step_2"], [5, -1], "at least 0; got -1"),
    ],
)
def test_names_without_a_clear_step_are_refused(names, given, words):
    with pytest.raises(ConfigError, match=words):
        steps_of(names, given)


@pytest.mark.parametrize(
    ("config", "written"),
    [
        ({"trainer": {}, "probe": {}}, "nerve-probe"),
        ({"measure": {}}, "nerve.measure"),
        ({"monitor": {}}, "nerve.watch"),
        ({"monitor": {}, "trainer": {"name": "mine"}}, "nerve.watch"),
    ],
)
def test_a_run_without_weights_is_distinguished_from_a_model(config, written):
    nerve.RunRecord.create(Path("mine"), config)
    status, _, err = nerve_probe("mine")
    assert status == 1
    assert f"mine is a run of {written}, which has measurements but no weights" in err


def test_a_revision_on_the_hub_is_requested_by_name(monkeypatch):
    """The arguments that `from_pretrained` gets for it, without a network."""
    asked = []

    def config(name, **how):
        asked.append((name, how))
        raise OSError("no network")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)
    monkeypatch.setattr("nerve.cli.probing.folders.check_hub", lambda places: None)
    status, _, err = nerve_probe("EleutherAI/pythia-70m@step1000")
    assert status == 1
    assert asked == [("EleutherAI/pythia-70m", {"revision": "step1000"})]
    assert "is not a folder here, and on the hub cannot be read" in err


def test_the_default_device_is_a_gpu_if_there_is_one(monkeypatch):
    assert device_of(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(None).type == "cuda"
