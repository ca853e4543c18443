"""What a measurement costs with groups and sites: time to accumulate and to solve, and memory.

    python benchmarks/groups.py                  # on a GPU: the sizes of GPT-2 125M, bfloat16
    taskset -c 0,1 python benchmarks/groups.py   # without one: four layers of d_model 128, float32

A line a choice of groups and sites: seconds of the forward passes that are measured (the model's
own among them), of the eigenproblems where they lie, and bytes of covariances; the last column is
their peak on a GPU. Each choice is measured three times, and the best counts.
"""

import argparse
import time
from contextlib import nullcontext

import torch

from nerve.measuring.around import sites_around
from nerve.measuring.find import find_ffns
from nerve.measuring.groups import Grouped
from nerve.measuring.masks import Chosen
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.models.gpt import GPT, GPTConfig

AROUND = ("stream_in", "input", "output", "stream_out")
CHOICES: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((), ()),
    (("halves",), ()),
    (("position",), ()),
    (("frequency",), ()),
    (("position", "frequency"), ()),
    (("position", "frequency", "halves"), ()),
    ((), AROUND),
    (("position", "frequency", "halves"), AROUND),
]


def main() -> None:
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12 if is_gpu else 4)
    parser.add_argument("--d-model", type=int, default=768 if is_gpu else 128)
    parser.add_argument("--seq-len", type=int, default=1024 if is_gpu else 128)
    parser.add_argument("--batches", type=int, default=3 if is_gpu else 2)
    parser.add_argument("--batch-size", type=int, default=8 if is_gpu else 16)
    given = parser.parse_args()
    device = torch.device("cuda" if is_gpu else "cpu")
    vocab = 1024
    config = GPTConfig(
        n_layers=given.layers, d_model=given.d_model, n_heads=given.d_model // 64,
        seq_len=given.seq_len, vocab_size=vocab,
    )  # fmt: skip
    model = GPT(config, seed=0).to(device).eval()
    counts = torch.arange(vocab, 0, -1)
    generator = torch.Generator().manual_seed(0)
    size = (given.batches, given.batch_size * given.seq_len)
    ids = torch.multinomial(counts.expand(size[0], -1).double(), size[1], True, generator=generator)
    batches = ids.reshape(size[0], given.batch_size, given.seq_len).to(device)
    name = torch.cuda.get_device_name() if is_gpu else f"{torch.get_num_threads()} threads"
    print(f"{name}; {config.n_layers} layers, d_ff {4 * config.d_model}, {ids.numel():,} tokens")
    print(f"{'groups and sites':48} forward_s  solve_s  n_solved  covariances_GiB  peak_GiB")
    for groups, sites in CHOICES:
        rows = [measured(model, batches, Grouped(groups, counts), sites) for _ in range(3)]
        forward, solve, n_solved, held, peak = (min(column) for column in zip(*rows, strict=True))
        label = "+".join((*groups, *(["sites"] if sites else []))) or "none"
        print(f"{label:48} {forward:9.3f} {solve:8.3f} {n_solved:9.0f} {held:16.3f} {peak:9.3f}")


def measured(
    model: GPT, batches: torch.Tensor, grouped: Grouped, sites: tuple[str, ...]
) -> tuple[float, float, float, float, float]:
    """Seconds of the passes and of the eigenproblems, how many these are, and GiB."""
    ffns = find_ffns(model)
    probe = Probe(ffns, sites_around(ffns, sites) if sites else None)
    probe.install()
    is_gpu = batches.is_cuda
    if is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    measurement = Measurement(probe, grouped=grouped, sites=sites)
    half = torch.autocast("cuda", torch.bfloat16) if is_gpu else nullcontext()
    with torch.no_grad(), half:
        for batch in batches:
            measurement.start(Chosen(ids=batch))
            model(batch)
            measurement.finish_forward()
    measurement.stop()
    problems = [*measurement.eigenproblems(), *measurement.group_eigenproblems()]
    if is_gpu:
        torch.cuda.synchronize()
    passed = time.perf_counter()
    for problem in problems:
        problem.solve()
    solved = time.perf_counter()
    probe.remove()
    peak = torch.cuda.max_memory_allocated() / 2**30 if is_gpu else 0.0
    covariances = [c for of in measurement._of for c in of.parts.covariances.values()]
    held = sum(8 * covariance.dim**2 for covariance in covariances) / 2**30
    return passed - began, solved - passed, float(len(problems)), held, peak


if __name__ == "__main__":
    main()
