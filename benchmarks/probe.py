"""What nerve-probe takes of a GPT-2 124M with random weights, beside a plain forward pass.

Both load the model and the text in a process of their own, so that each has its own peak memory,
and run the same batches. The plain one gives the loss and measures nothing. Text is the standard
library's source, a token a byte, so that no tokenizer has to be trained.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from host_memory import host_peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--n-tokens", type=int, default=65_536)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--n-layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--part", choices=("plain", "probe"), help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.part:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        {"plain": plain, "probe": probe}[args.part](args, *rest)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        n_parameters = save(args, model)
        print(
            f"{n_parameters / 1e6:.0f}M parameters, {args.n_tokens:,} tokens in sequences of "
            f"{args.seq_len}, batches of {args.batch_size}, {args.dtype}, {where(args.device)}"
        )
        for part in ("plain", "probe"):
            command = [sys.executable, __file__, *sys.argv[1:], "--part", part, str(model)]
            subprocess.run(command, check=True, cwd=folder)


def save(args: argparse.Namespace, folder: Path) -> int:
    """A model and a tokenizer, as somebody has trained and saved them; counts the parameters."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers.logging.disable_progress_bar()
    config = transformers.GPT2Config(
        n_embd=args.d_model, n_layer=args.n_layers, n_head=args.d_model // 64
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    letters = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_ = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_, eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def command_line_of(args: argparse.Namespace) -> list[str]:
    names = ("n_tokens", "seq_len", "batch_size", "device", "dtype")
    return [text for n in names for text in (f"--{n.replace('_', '-')}", str(getattr(args, n)))]


def plain(args: argparse.Namespace, model: str) -> None:
    """The passes alone, on what nerve-probe would measure."""
    from nerve.cli.probing.run import source_of
    from nerve.cli.probing.source import ProbeArguments

    given = ProbeArguments(
        models=(model,),
        n_tokens=args.n_tokens,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        device=args.device,
        dtype=args.dtype,
    )
    began = time.perf_counter()
    source = source_of(given)
    network = source.load(source.checkpoints[0])
    data = source.data(network, source.find(network))
    loaded = time.perf_counter()
    with torch.no_grad():
        losses = [data.forward(network, batch)["loss"] for batch in data.batches]
        loss = float(torch.stack(losses).mean())
    ended = time.perf_counter()
    print(
        f"plain: model and text {loaded - began:.1f} s, forward passes {ended - loaded:.1f} s, "
        f"loss {loss:.4f}, {peak(args.device)}",
        flush=True,
    )


def probe(args: argparse.Namespace, model: str) -> None:
    """The command, without the imports."""
    from nerve.cli.probe import main as nerve_probe

    began = time.perf_counter()
    nerve_probe([model, "-o", "out", *command_line_of(args)])
    print(f"nerve-probe: {time.perf_counter() - began:.1f} s in all, {peak(args.device)}")


def peak(device: str) -> str:
    host = host_peak() / 2**30
    if not device.startswith("cuda"):
        return f"peak memory {host:.2f} GiB"
    return (
        f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the device, "
        f"{host:.2f} of the host"
    )


def where(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main()
