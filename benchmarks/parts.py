"""What the checksums of parts cost: writing and reading with and without, side by side.

Parts as a GPT of 12 layers leaves them, with d_ff 512: what one measured step flushes, and what the
compaction of 100 of them makes. The two ways take turns on the same table; files are in the cache,
and `fsync` is left out, which costs both the same and is the disk's.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nerve.files import write_atomically
from nerve.storage.parts import read_part, write_part
from nerve.storage.schema import DATASETS, encoding_of, table_of

N_LAYERS, D_FF = 12, 512


def metrics(n_steps: int) -> pa.Table:
    """Rows with a random number in every column that is measured."""
    generator = np.random.default_rng(0)
    dataset = DATASETS["metrics"]
    measured = [field.name for field in dataset.schema if pa.types.is_floating(field.type)]
    fixed = {"ffn": "ffn", "n_samples": 8 * D_FF, "d_ff": D_FF, "d_in": D_FF // 4}
    rows = (
        {
            **dict(zip(measured, generator.random(len(measured)).tolist(), strict=True)),
            **fixed,
            "step": step,
            "tokens_seen": step * 2048,
            "layer": layer,
            "precision": "float32",
            "status": "ok",
        }
        for step in range(n_steps)
        for layer in range(N_LAYERS)
    )
    return table_of(dataset, rows, "cafe0001")


def spectra(n_steps: int) -> pa.Table:
    """Falling eigenvalues over six orders of magnitude."""
    generator = np.random.default_rng(0)
    rows = (
        {
            "step": step,
            "layer": layer,
            "ffn": "ffn",
            "site": site,
            "eigenvalues": np.sort(10.0 ** generator.uniform(-6, 0, D_FF))[::-1],
        }
        for step in range(n_steps)
        for layer in range(N_LAYERS)
        for site in ("pre", "post")
    )
    return table_of(DATASETS["spectra"], rows, "cafe0001")


def write_plain(path: Path, table: pa.Table) -> None:
    """`write_part` without checksums."""
    options = encoding_of(table.schema)
    write_atomically(path, lambda file: pq.write_table(table, file, **options))


def read_plain(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read(use_threads=False)


def in_turns(calls: list[Callable[[], object]], repeats: int) -> np.ndarray:
    """Milliseconds of each call, (len(calls), repeats); which one is first alternates."""
    took = np.zeros((len(calls), repeats))
    for i in range(-2, repeats):  # two to warm up, overwritten at the end
        for j in range(len(calls)) if i % 2 else reversed(range(len(calls))):
            began = time.perf_counter()
            calls[j]()
            took[j, i] = 1000 * (time.perf_counter() - began)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    os.fsync = lambda descriptor: None
    print("part, rows: bytes and ms without → with checksums, mean (worst)")
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name, "plain.parquet"), Path(name, "part.parquet")]
        for dataset, make in (("metrics", metrics), ("spectra", spectra)):
            for n_steps in (1, 100):
                table = make(n_steps)
                writes = in_turns(
                    [partial(write_plain, paths[0], table), partial(write_part, paths[1], table)],
                    repeats,
                )
                read_ours = partial(read_part, paths[1], DATASETS[dataset])
                reads = in_turns([partial(read_plain, paths[0]), read_ours], repeats)
                sizes = [path.stat().st_size for path in paths]
                print(
                    f"{dataset}, {len(table)}: {sizes[0]:,} → {sizes[1]:,} B "
                    f"(+{sizes[1] / sizes[0] - 1:.2%}); write {_both(writes)}, read {_both(reads)}",
                    flush=True,
                )


def _both(took: np.ndarray) -> str:
    plain, checked = (f"{row.mean():.2f} ({row.max():.2f})" for row in took)
    return f"{plain} → {checked} ms"


if __name__ == "__main__":
    main()
