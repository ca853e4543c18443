"""What the spectral regularizer costs a step, and how near the gradient of a part of the tokens is.

Steps with and without it take turns in one process: forward, backward, clipping and the update of a
GPT on the words of the standard library. The cosine is that of the gradients of the term by all
weights, from `--n-tokens` of a batch and from all of it, before training and after the steps.
"""

import argparse
import re
import statistics
import sysconfig
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from nerve.models import Penalty, Regularizer
from nerve.models.gpt import GPT, GPTConfig
from nerve.nn.activation import Activation
from nerve.nn.ffn import FFNDesign
from nerve.optim import Schedule
from nerve.training.module import LanguageModel

Batch = tuple[Tensor, Tensor]


def python_words(vocab: int) -> Tensor:
    """The standard library as numbers of its words and signs by frequency, the rarest all alike."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    words = re.findall(r"\w+|\s+|[^\w\s]", "".join(path.read_text() for path in paths))
    ranked = {word: i for i, (word, _) in enumerate(Counter(words).most_common(vocab - 1))}
    return torch.tensor([ranked.get(word, vocab - 1) for word in words])


def batch_of(args: argparse.Namespace, words: Tensor, seed: int) -> Batch:
    """Sequences from anywhere in the text."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(words) - args.seq_len, (args.batch, 1), generator=generator)
    windows = words[starts + torch.arange(args.seq_len + 1)].to(args.device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Trained:
    """A model and its steps.

    Args:
        args: of the command line.
        regularizer: of its training.
    """

    def __init__(self, args: argparse.Namespace, regularizer: Regularizer) -> None:
        config = GPTConfig(
            n_layers=args.layers,
            d_model=args.d_model,
            n_heads=args.d_model // 64 if args.d_model >= 128 else 2,
            seq_len=args.seq_len,
            vocab_size=args.vocab,
            init_std=0.02 * (768 / args.d_model) ** 0.5,
            activation=Activation(args.activation),
            ffn=FFNDesign(bias=False),
        )
        self.args = args
        self.model = GPT(config, seed=0).to(args.device)
        self.module = LanguageModel(
            self.model,
            lambda model: torch.optim.AdamW(model.parameters()),
            Schedule("constant", cooldown=0.0),
            compile=args.compile,
            regularizer=regularizer,
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

    def step(self, batch: Batch) -> float:
        """One update; seconds."""
        _wait(self.args)
        began = time.perf_counter()
        with self._autocast():
            loss, _ = self.module._training_losses(batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        _wait(self.args)
        return time.perf_counter() - began

    def gradient(self, batch: Batch, n_tokens: int, site: str) -> Tensor:
        """Of log PR alone, by all weights, in eager code."""
        model = GPT(self.model.config, seed=0).to(self.args.device)
        model.load_state_dict(self.model.state_dict())
        penalty = Penalty(model, Regularizer("participation_ratio", 1.0, site, n_tokens=n_tokens))
        model.head = nn.Identity()  # its logits are not needed
        penalty.start()
        with self._autocast():
            model(batch[0])
        penalty.finish().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.cat(gradients).double()

    def _autocast(self) -> torch.autocast:
        is_cuda = self.args.device == "cuda"
        return torch.autocast(self.args.device, dtype=torch.bfloat16, enabled=is_cuda)


def _wait(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def cosines(trained: Trained, words: Tensor, when: str) -> None:
    args = trained.args
    for site in ("post", "pre"):
        found = []
        for seed in range(args.batches):
            batch = batch_of(args, words, 10_000 + seed)
            some, whole = (trained.gradient(batch, n, site) for n in (args.n_tokens, 10**9))
            found.append(float(torch.cosine_similarity(some, whole, dim=0)))
        print(
            f"{when}, {site}: cosine of the gradients of {args.n_tokens} and of "
            f"{args.batch * args.seq_len} tokens: lowest {min(found):.4f} of {len(found)} batches, "
            f"median {statistics.median(found):.4f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=512, help="sequences per step")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--n-tokens", type=int, default=16_384)
    parser.add_argument("--activation", default="gelu")
    parser.add_argument("--weight", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batches", type=int, default=3, help="for the cosines")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_float32_matmul_precision("high")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {args}", flush=True)
    words = python_words(args.vocab)
    regularizer = Regularizer("participation_ratio", args.weight, n_tokens=args.n_tokens)
    plain, regularized = Trained(args, Regularizer()), Trained(args, regularizer)
    cosines(plain, words, "before training")
    times: dict[str, list[float]] = {"plain": [], "regularized": []}
    for i in range(args.steps):
        batch = batch_of(args, words, i)
        times["plain"].append(plain.step(batch))
        times["regularized"].append(regularized.step(batch))
    medians = {name: statistics.median(of[len(of) // 5 :]) for name, of in times.items()}
    ratio = medians["regularized"] / medians["plain"]
    print(
        f"a step: {1000 * medians['plain']:.1f} ms, with the regularizer "
        f"{1000 * medians['regularized']:.1f} ms: {ratio:.3f} times",
        flush=True,
    )
    cosines(plain, words, f"after {args.steps} steps")


if __name__ == "__main__":
    main()
