"""Many synthetic runs: how long it takes to load their records and metrics, and to report on them.

Runs are written by the store itself, 12 layers at 100 steps each unless told otherwise: two
activations, two normalizations and learning rates, four seeds. On two cores, for 10,000 runs:
records are to be loaded in 3 s, metrics in 15 s and 4 GB, status shown in 10 s, the report written
in 3 minutes. Times are of one pass each, files in the cache. Before that, one run that is measured
often: the milliseconds of a flush must not grow with the parts that are there.
"""

import argparse
import contextlib
import io
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

import nerve
from nerve.cli.status import show, status_of
from nerve.report.write import write_report
from nerve.storage.find import find_runs
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore

N_SEEDS = 4
ACTIVATIONS = ("gelu", "relu")
NORMALIZATIONS = ("layernorm", "none")
D_MODEL, WIDTH = 128, 4


def config(index: int) -> dict[str, Any]:
    design = index // N_SEEDS
    return {
        "seed": index % N_SEEDS,
        "activation": {"name": ACTIVATIONS[design % 2]},
        "normalization": {"kind": NORMALIZATIONS[design // 2 % 2], "placement": "pre"},
        "ffn": {"width": WIDTH, "gated": False, "constraint": "none"},
        "optimizer": {
            "name": "adamw",
            "lr": 1e-4 * (1 + design // 4),
            "schedule": {"warmup": 0.05},
        },
        "trainer": {"max_steps": 1000},
        "model": {f"value_{i}": i for i in range(60)},  # as many leaves as a real run has
    }


def rows(index: int, n_layers: int, n_steps: int) -> Iterator[dict[str, Any]]:
    """Metrics that change with the loss, differently for each run."""
    generator = np.random.default_rng(index)
    offsets = generator.normal(scale=0.1, size=n_layers)
    d_ff = D_MODEL * WIDTH
    for i in range(n_steps):
        loss = (
            3.0 + 4.0 / (1 + i / 10) + 0.2 * (index // N_SEEDS % 2) + generator.normal(scale=0.02)
        )
        for layer in range(n_layers):
            pre, post = 60 / loss + offsets[layer], 300 / loss + offsets[layer]
            yield {
                "step": i * 10,
                "tokens_seen": i * 20480,
                "layer": layer,
                "ffn": "ffn",
                "n_samples": 8 * d_ff,
                "d_ff": d_ff,
                "d_in": D_MODEL,
                "se_pre": np.log(pre) + 0.5,
                "se_post": np.log(post) + 0.5,
                "pr_pre": pre,
                "pr_post": post,
                "eee_pre": 1 - pre / d_ff,
                "eee_post": 1 - post / d_ff,
                "js": 0.05 + 0.01 * offsets[layer] + 0.1 / loss,
                "train_loss": loss - 0.1,
                "val_loss": loss,
                "lr": 1e-3,
                "precision": "float32",
                "status": "ok",
            }


def write_runs(folder: Path, n_runs: int, n_layers: int, n_steps: int) -> None:
    for index in range(n_runs):
        values = config(index)
        record = RunRecord.create(
            folder / f"{index:05d}",
            values,
            sweep="benchmark",
            seed=values["seed"],
            unigram_loss=6.5,
            fingerprints=dict.fromkeys(("corpus", "tokenizer", "heldout"), "0" * 16),
        )
        store = RunStore(record.directory, record.run_id)
        store.append_metrics(rows(index, n_layers, n_steps))
        store.flush(n_steps * 10)
        record.finish("done", step=n_steps * 10, final={"val_loss": 3.5})


def flushes(folder: Path, n_flushes: int, n_layers: int) -> None:
    """Writes one run, a part at each step, and tells what the first and the last parts took."""
    store = RunStore(folder, "flushes")
    times = []
    for number, (step, layers) in enumerate(
        groupby(rows(0, n_layers, n_flushes), key=lambda row: row["step"])
    ):
        store.append_metrics(layers)
        store.append_scalars([{"step": step, "name": "loss", "value": float(number)}])
        began = time.perf_counter()
        store.flush(step)
        times.append(1000 * (time.perf_counter() - began))
    for name, some in (("first", times[: n_flushes // 10]), ("last", times[-n_flushes // 10 :])):
        print(f"flush, {name} tenth: mean {np.mean(some):.2f} ms, worst {max(some):.2f}")
    print(f"{n_flushes} flushes {sum(times) / 1000:.1f} s", flush=True)


def timed(name: str, limit_s: float | None, call: Callable[[], Any]) -> None:
    began = time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    note = f" (limit for 10,000 runs {limit_s:.0f} s)" if limit_s else ""
    print(f"{name:13} {seconds:6.2f} s{note}, peak so far {peak:.2f} GB", flush=True)


def status(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        show([status_of(directory) for directory in find_runs(folder)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--flushes", type=int, default=4000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "runs"
        timed("write", None, lambda: write_runs(folder, args.runs, args.layers, args.steps))
        if args.flushes:
            flushes(Path(name) / "flushes", args.flushes, args.layers)
        timed("load_runs", 3, lambda: nerve.load_runs(folder))
        timed("nerve-status", 10, lambda: status(folder))
        timed("load_metrics", 15, lambda: nerve.load_metrics(folder))
        timed("report", 180, lambda: write_report(folder, Path(name) / "report"))
        size = (Path(name) / "report" / "index.html").stat().st_size
        print(f"page          {size / 1e6:6.1f} MB")


if __name__ == "__main__":
    main()
