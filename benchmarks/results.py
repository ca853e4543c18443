"""Many runs: how long it takes to load, show and report on them, and how that grows.

    python benchmarks/results.py                          # 100 and 1,000 runs
    python benchmarks/results.py --runs 100 1000 10000
    python benchmarks/results.py --runs 100 --only load_runs --flushes 0 --peers 20

The runs are those of sweeps that have ended: run.json with a real configuration, what Hydra
saved, one compacted part of metrics with 12 layers at 100 steps, every column filled, and four
seeds of each design. They are written with the functions of the store, without waiting for the
disk. Each figure is of a fresh process: seconds (of the loaders without imports, of the commands
with them), CPU seconds, and the peak of its memory. Files are in the cache.

For 10,000 runs on two idle cores records are to be loaded in 3 s, metrics in 15 s and 4 GB, status
shown in 10 s, the report written in 3 minutes, and all of it is to grow with the runs, not faster.
Before that, one run that is measured often: a flush must not take longer for the parts that are
there; and, with `--peers`, the metrics of some runs in other formats (trackers.py).
"""

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import trackers

from nerve.metric_names import STORED
from nerve.sites_and_groups import SITES
from nerve.storage.manifest import add_to_manifest
from nerve.storage.parts import part_path, write_part
from nerve.storage.record import RunRecord
from nerve.storage.schema import DATASETS, METRICS_SCHEMA
from nerve.storage.store import RunStore

ROOT = Path(__file__).resolve().parents[1]
N_SEEDS = 4
LEVELS: dict[str, tuple[Any, ...]] = {
    "activation.name": ("gelu", "relu"),
    "normalization.kind": ("layernorm", "none"),
    "ffn.width": (1, 2, 4, 6, 8),
    "optimizer.lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "position.name": ("learned", "rope", "sinusoidal", "alibi", "none"),
    "optimizer.name": ("adamw", "sgd", "adafactor", "muon", "dion"),
}
"""2,500 designs."""
D_MODEL = 128
N_LAYERS, N_STEPS, EVERY = 12, 100, 10

LIMITS = {"load_runs": 3, "load_metrics": 15, "nerve-status": 10, "nerve-report": 180}
"""Seconds for 10,000 runs."""


def stored_config() -> dict[str, Any]:
    """The configuration of a run that this repository keeps."""
    record = next(iter(sorted((ROOT / "study" / "runs" / "normfree_gpu").glob("*/run.json"))))
    config: dict[str, Any] = json.loads(record.read_text())["config"]
    return config


def design(number: int) -> dict[str, Any]:
    """The values of one of the designs, the first factors varying fastest."""
    values = {}
    for name, levels in LEVELS.items():
        number, level = divmod(number, len(levels))
        values[name] = levels[level]
    return values


def config_of(index: int, stored: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a run, and the overrides that make it."""
    values: dict[str, Any] = design(index // N_SEEDS)
    config = {
        name: dict(group) if isinstance(group, dict) else group for name, group in stored.items()
    }
    for name, value in values.items():
        group, key = name.split(".")
        config[group][key] = value
    config["seed"] = index % N_SEEDS
    config["trainer"]["max_steps"] = N_STEPS * EVERY
    overrides = [f"{name}={value}" for name, value in values.items()]
    return config, [*overrides, f"seed={index % N_SEEDS}"]


def metrics_of(index: int, run_id: str, n_layers: int, n_steps: int) -> pa.Table:
    """Metrics that change with the loss, differently for each run; no column is empty."""
    generator = np.random.default_rng(index)
    n = n_layers * n_steps
    values = design(index // N_SEEDS)
    d_ff = D_MODEL * values["ffn.width"]
    step = np.repeat(np.arange(n_steps), n_layers)
    noise = np.repeat(generator.normal(scale=0.02, size=n_steps), n_layers)
    slower = 0.2 * (values["normalization.kind"] == "none") + 0.02 * (index // N_SEEDS % 25)
    loss = 3.0 + 4.0 / (1 + step / 10) + slower + noise
    own = np.tile(generator.normal(scale=0.1, size=n_layers), n_steps)
    columns: dict[str, Any] = {name: 0.01 * generator.random(n) for name in STORED}
    for site, top in zip(SITES, (60, 300), strict=True):
        rank = np.clip(top / loss + own + 0.05 * generator.random(n), 1.0, d_ff)
        columns |= {
            f"se_{site}": np.log(rank) + 0.3,
            f"pr_{site}": rank,
            f"pr_{site}_corrected": 1.01 * rank,
            f"eee_{site}": 1 - rank / d_ff,
        }
    columns |= {
        "step": step * EVERY,
        "tokens_seen": step * EVERY * 2048,
        "layer": np.tile(np.arange(n_layers), n_steps),
        "ffn": ["ffn"] * n,
        "n_samples": np.full(n, 8 * d_ff),
        "d_ff": np.full(n, d_ff),
        "d_in": np.full(n, D_MODEL),
        "train_loss": loss - 0.1,
        "val_loss": loss,
        "lr": values["optimizer.lr"] * np.minimum(1, (step + 1) / 5),
        "precision": ["float64"] * n,
        "status": ["ok"] * n,
        "run_id": [run_id] * n,
    }
    arrays = [pa.array(columns[field.name], field.type) for field in METRICS_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=METRICS_SCHEMA)


def write_runs(folder: Path, indices: range, n_layers: int, n_steps: int) -> None:
    """Writes the runs of a sweep, as they are when it has ended."""
    stored = stored_config()
    with (
        patch("os.fsync"),
        patch("nerve.storage.record.git_commit", lambda: "0" * 40),
        patch("nerve.storage.record.package_versions", lambda: {"nerve": "0", "torch": "0"}),
    ):
        for index in indices:
            write_run(folder / f"{index:05d}", index, stored, n_layers, n_steps)


def write_run(
    directory: Path, index: int, stored: dict[str, Any], n_layers: int, n_steps: int
) -> None:
    config, overrides = config_of(index, stored)
    record = RunRecord.create(
        directory,
        config,
        sweep="benchmark",
        seed=config["seed"],
        unigram_loss=8.5,
        n_parameters=10_000_000,
        device="cpu",
        fingerprints=dict.fromkeys(("corpus", "tokenizer", "heldout"), "0" * 16),
    )
    for name in ("checkpoints", ".hydra", "metrics", "scalars", "spectra"):
        (directory / name).mkdir()
    (directory / ".lock").write_text(json.dumps({"host": record.host, "pid": 1}))
    (directory / ".hydra" / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
    last = (n_steps - 1) * EVERY
    path = part_path(directory, DATASETS["metrics"], last)
    table = metrics_of(index, record.run_id, n_layers, n_steps)
    write_part(path, table)
    add_to_manifest(directory, "metrics", [path.name])
    final = {"val_loss": table["val_loss"][-1].as_py(), "bits_per_byte": 1.5}
    record.finish("done", step=last, final=final)


def flushes(folder: Path, n_flushes: int, n_layers: int) -> None:
    """Writes one run, a part at each step, and tells what the first and the last parts took."""
    store = RunStore(folder, "flushes")
    rows = metrics_of(0, "flushes", n_layers, n_flushes).to_pylist()
    times = []
    for number, (step, layers) in enumerate(groupby(rows, key=lambda row: row["step"])):
        store.append_metrics(layers)
        store.append_scalars([{"step": step, "name": "loss", "value": float(number)}])
        began = time.perf_counter()
        store.flush(step)
        times.append(1000 * (time.perf_counter() - began))
    for name, some in (("first", times[: n_flushes // 10]), ("last", times[-n_flushes // 10 :])):
        print(f"flush, {name} tenth: mean {np.mean(some):.2f} ms, worst {max(some):.2f}")
    print(f"{n_flushes} flushes {sum(times) / 1000:.1f} s", flush=True)


def beside_peers(n_runs: int, n_layers: int, n_steps: int) -> None:
    """Prints what it takes to store and load the metrics of runs, in nerve and otherwise."""
    tables = [metrics_of(index, "", n_layers, n_steps) for index in range(n_runs)]
    print(f"metrics of {n_runs:,} runs, stored and loaded in turn", flush=True)
    for line in trackers.compare(tables):
        print(line, flush=True)


def calls(folder: Path) -> dict[str, Callable[[], Any]]:
    """What is measured, each in a process of its own."""

    def load_runs() -> None:
        nerve.load_runs(folder)

    def load_metrics() -> None:
        frame = nerve.load_metrics(folder)
        size = frame.memory_usage(deep=True).sum()
        print(f"{len(frame):,} rows of {size / len(frame):.0f} bytes", file=sys.stderr)

    def status() -> None:
        from nerve.cli.status import main

        with patch("sys.argv", ["nerve-status", str(folder)]):
            main()

    def report() -> None:
        from nerve.cli.report import main

        main([str(folder), "-o", str(folder.parent / "report")])

    import nerve

    if "load" in sys.argv[2]:
        _ = nerve.load_runs  # imported before the clock starts
    return {
        "load_runs": load_runs,
        "load_metrics": load_metrics,
        "nerve-status": status,
        "nerve-report": report,
    }


def measure(name: str, folder: Path) -> None:
    """Prints what one call takes, as JSON."""
    call = calls(folder)[name]
    began, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        call()
    used = {"s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(used | {"peak_bytes": peak}))


def measured(name: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name, str(folder)]
    began = time.perf_counter()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output)
    return found | ({"s": time.perf_counter() - began} if name.startswith("nerve-") else {})


def table(sizes: list[int], names: list[str], folder: Path, shape: tuple[int, int]) -> None:
    """Adds runs to the folder size by size, and prints what each call takes at each."""
    written, before = 0, dict[str, float]()
    for size in sizes:
        began = time.perf_counter()
        write_runs(folder, range(written, size), *shape)
        print(f"{size:,} runs (written in {time.perf_counter() - began:.0f} s)", flush=True)
        for name in names:
            used = measured(name, folder)
            line = f"  {name:13} {used['s']:7.2f} s, CPU {used['cpu_s']:7.2f} s"
            line += f", peak {used['peak_bytes'] / 1e9:5.2f} GB"
            if name in before:
                line += f", {used['s'] / before[name] / (size / written):.2f} of linear growth"
            print(f"{line} (at most {LIMITS[name]} s for 10,000)", flush=True)
            before[name] = used["s"]
        written = size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--only", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--layers", type=int, default=N_LAYERS)
    parser.add_argument("--steps", type=int, default=N_STEPS)
    parser.add_argument("--flushes", type=int, default=4000)
    parser.add_argument("--peers", type=int, default=0, help="compares so many runs with peers")
    parser.add_argument("--in", dest="folder", type=Path, help="keeps the runs in this new folder")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        name = args.folder or stack.enter_context(tempfile.TemporaryDirectory())
        if args.flushes:
            flushes(Path(name) / "flushes", args.flushes, args.layers)
        if args.peers:
            beside_peers(args.peers, args.layers, args.steps)
        table(sorted(args.runs), args.only, Path(name) / "runs", (args.layers, args.steps))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
