"""Tiny trained and saved transformers models, with a tokenizer."""

import contextlib
import gc
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import pandas as pd
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn

import nerve
from nerve.cli.probe import main

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LETTERS = " etaoinshrdlcumwfgypbvk"
"""What the tokenizer knows one by one: with its special tokens 27 ids."""


def save_tokenizer(folder: Path, letters: str = LETTERS, **special: str) -> None:
    """A tokenizer with one token per letter; `eos_token` ends a document."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *letters]
    tokenizer = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | special
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)


def llama(seed: int = 0, **values: Any) -> nn.Module:
    """A causal language model of two layers, d_model 16, d_ff 40, 32 positions."""
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 32,
            "max_position_embeddings": 32,
            **values,
        }
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.double().eval()


def save_gguf(model: nn.Module, file: Path) -> None:
    """A model of `llama` with 261 tokens and a byte tokenizer, in one file."""
    config, writer = model.config, gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<unk>", *letters, "ab", "abc"])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_token_types(3 * [gguf.TokenType.CONTROL] + 258 * [gguf.TokenType.NORMAL])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if ".q_proj." in name or ".k_proj." in name:  # llama.cpp turns neighbors, not halves
            halves = weight.reshape(config.num_attention_heads, 2, -1, config.hidden_size)
            weight = halves.transpose(1, 2).reshape(weight.shape)
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored, weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save(model: nn.Module, folder: Path) -> Path:
    """The model and its tokenizer, in a folder."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_text(folder: Path, *, n_letters: int = 1200, seed: int = 0, n_files: int = 3) -> Path:
    """Writes some text files; returns the pattern that matches them."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(n_files):
        index = torch.randint(len(LETTERS), (n_letters // n_files,), generator=generator)
        (folder / f"{number}.txt").write_text("a" + "".join(LETTERS[i] for i in index))
    return folder / "*.txt"


def nerve_probe(*arguments: Any) -> tuple[int, str, str]:
    """Calls `nerve-probe` in this process; returns its exit status, stdout and stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(each) for each in arguments])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    gc.collect()  # what is left of it, as if its process had ended
    return status, out.getvalue(), err.getvalue()


def save_series(steps: Iterable[int]) -> None:
    """Saves weights that differ from step to step in `ckpt/step_*`, and text."""
    for step in steps:
        save(llama(seed=step), Path(f"ckpt/step_{step}"))
    write_text(Path("text"))


def probed(*asked: Any) -> tuple[int, str, str]:
    """Runs `nerve-probe` on 64 tokens of that text, into `out`."""
    return nerve_probe(*asked, "--text", "text/*.txt", "-o", "out", "--n-tokens", 64)


def assert_same_run(one: str, other: str) -> None:
    """Asserts that rows and eigenvalues are equal, bit for bit."""
    for load in (nerve.load_metrics, nerve.load_spectra):
        keys = ["step", "layer", *(["site"] if load is nerve.load_spectra else [])]
        left, right = (
            load(each).drop(columns="run_id").sort_values(keys, ignore_index=True)
            for each in (one, other)
        )
        pd.testing.assert_frame_equal(left, right)
    ids = [nerve.RunRecord.load(each).config_id for each in (one, other)]
    assert ids[0] == ids[1]
