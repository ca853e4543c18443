"""What monitor.shortcut=projected leaves out: every metric against that of the features themselves.

Runs: small GPTs trained under bfloat16 autocast on the CPU, PreLN and norm-free, GELU and ReLU. At
the steps that they keep each layer is measured on the same held-out tokens both ways; beside the
error stands what the seed and the choice of tokens make of the same number. Plants: layers on
random inputs whose pre has a large mean, tiny values, loud features, a steep spectrum, with
what the limit on rounding says of them, and the error if it were not there.

    python benchmarks/projected.py                               # the plants
    python benchmarks/projected.py --train --runs FOLDER         # trains the runs, then all of it
    python benchmarks/projected.py --runs FOLDER                 # the runs that are there
"""

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import nerve
from nerve.cli.probing.runs import KeptCheckpoints
from nerve.cli.probing.source import ProbeArguments
from nerve.derived import with_derived
from nerve.measuring import accumulator
from nerve.measuring.ffns import FFN, FFNAdapter
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.measuring.projection import PROJECTED

DESIGNS = {
    f"{norm}, {act}": (f"normalization={norm}", f"activation={act}")
    for norm in ("preln", "normfree")
    for act in ("gelu", "relu")
}
OVERRIDES = ("trainer.precision=bf16-mixed", "data.batch_size=8", "monitor.every_n_steps=1000")

RELATIVE = ("pr_pre", "pr_pre_corrected", "variance_pre", "pr_gain", "exp_se_pre", "renyi_half")
ABSOLUTE = ("se_pre", "se_pre_normalized", "eee_pre", "js", "delta_eee", "largest_p")
AFTER = ("se_post", "pr_post", "eee_post", "variance_outside", "mean_share_pre", "top_share_pre")
"""What is of the features either way."""


def measured(
    run: Callable[[], object], ffns: list[FFN], shortcut: bool | str, *, always: bool = False
) -> pd.DataFrame:
    """One row a layer, with derived columns and those of the tail of pre's spectrum.

    Args:
        run: one forward pass.
        ffns: the layers.
        shortcut: as of `nerve.measure`.
        always: whether pre is projected whatever its rounding.
    """
    probe = Probe(ffns)
    probe.install()
    measurement = Measurement(probe, shortcut=shortcut)
    no_limit = mock.patch.object(accumulator, "is_rounding_small", return_value=True)
    try:
        with no_limit if always else nullcontext():
            measurement.start()
            with torch.no_grad():
                run()
            measurement.finish_forward()
        spectra = measurement.spectra()
    finally:
        probe.remove()
    rows = with_derived(pd.DataFrame([each.row() for each in spectra]))
    p = [(each.pre / each.pre.sum()).numpy() for each in spectra]
    limits = rows["rank_limit_pre"]
    return rows.assign(
        renyi_half=[np.sqrt(each).sum() ** 2 for each in p],
        largest_p=[each[0] for each in p],
        beyond_rank=[each[int(rank) :].sum() for each, rank in zip(p, limits, strict=True)],
    )


def errors(projected: pd.DataFrame, full: pd.DataFrame) -> pd.DataFrame:
    """Of each row, by how far each column is off: relative or absolute."""
    off = {name: (projected[name] / full[name] - 1).abs() for name in RELATIVE}
    off |= {name: (projected[name] - full[name]).abs() for name in (*ABSOLUTE, *AFTER)}
    return pd.DataFrame(off)


def train(folder: Path, seeds: list[int], n_steps: int, kept: list[int]) -> None:
    for seed in seeds:
        for design, factors in DESIGNS.items():
            directory = folder / f"{design}, seed {seed}"
            if directory.exists():
                continue
            command = [sys.executable, "-m", "nerve.cli.run", *OVERRIDES, *factors]
            command += [f"seed={seed}", f"trainer.max_steps={n_steps}", f"checkpoint.keep={kept}"]
            command += [f"hydra.run.dir='{directory}'", "trainer.enable_progress_bar=false"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(f"trained: {directory.name}", flush=True)


def of_run(directory: Path) -> pd.DataFrame:
    """Rows of each kept step and layer: `what` is full, projected, projected whatever its rounding,
    or one of two halves of the held-out tokens."""
    design, _, seed = directory.name.rpartition(", seed ")
    source = KeptCheckpoints(
        ProbeArguments(models=(str(directory),), device="cpu", dtype="float32")
    )
    batches, rows = None, []
    for checkpoint in source.checkpoints:
        model = source.load(checkpoint)
        ffns = nerve.find_ffns(model)
        if batches is None:
            batches = torch.cat([x for x, _ in source.data(model, ffns).batches])
        half = len(batches) // 2
        for what, shortcut, tokens in (
            ("full", True, batches),
            ("projected", PROJECTED, batches),
            ("always", PROJECTED, batches),
            ("first half", True, batches[:half]),
            ("second half", True, batches[half:]),
        ):
            with torch.autocast("cpu", torch.bfloat16):
                run = partial(model, tokens)
                found = measured(run, list(ffns), shortcut, always=what == "always")
            rows.append(found.assign(what=what, step=checkpoint.step, design=design, seed=seed))
    return pd.concat(rows, ignore_index=True)


def table_of_runs(rows: pd.DataFrame) -> None:
    keys = ["design", "seed", "step", "layer"]
    by = {what: part.set_index(keys).sort_index() for what, part in rows.groupby("what")}
    full, projected = by["full"], by["projected"]
    taken = projected["precision"] == "projected_bfloat16"
    off = errors(projected, full)[taken]
    halves = errors(by["second half"], by["first half"]) / math.sqrt(2)
    columns = [*RELATIVE, *ABSOLUTE]
    grouped = full[columns].groupby(["design", "step", "layer"])
    of_seeds = grouped.std()
    of_seeds[list(RELATIVE)] /= grouped.mean()[list(RELATIVE)]
    print(
        f"{len(full)} rows of {full.index.get_level_values('seed').nunique()} seeds of "
        f"{len(DESIGNS)} designs; pre was projected in {taken.sum()}"
    )
    table = pd.DataFrame(
        {
            "median": off.median(),
            "95%": off.quantile(0.95),
            "largest": off.max(),
            "seeds, median": of_seeds.median(),
            "tokens, median": halves.median(),
        }
    )
    table = table.reindex(columns)
    table["largest / seeds"] = table["largest"] / table["seeds, median"]
    table.index = [f"{name}, relative" if name in RELATIVE else name for name in table.index]
    print(table.to_string(float_format="{:.2g}".format))
    print(f"of the features either way, largest difference: {off[list(AFTER)].max().max():.2g}")
    without = errors(by["always"], full)[~taken]
    print("\nhad pre been projected in the others, too, the median and the largest error:")
    print(without[columns].agg(["median", "max"]).T.to_string(float_format="{:.2g}".format))
    print("\nlargest error of SE, by design and step:")
    print(off["se_pre"].groupby(["design", "step"]).max().unstack().to_string(
        float_format="{:.1e}".format))  # fmt: skip
    some = ["mean_share_pre", "variance_pre", "pr_pre", "se_pre"]
    shown = full[some].assign(error=off["se_pre"], relative_variance=off["variance_pre"])
    print("\nthe five rows with the largest errors of SE:")
    print(shown.nlargest(5, "error").to_string(float_format="{:.3g}".format))
    print(f"\nmean_share_pre: {full['mean_share_pre'].describe().round(3).to_dict()}")
    print(f"share of p beyond the rank of W: {full['beyond_rank'].describe().to_dict()}")


class Layer(nn.Module):
    """An FFN whose weights can be set."""

    def __init__(self, d_in: int = 64, d_ff: int = 256) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_in, d_ff), nn.Linear(d_ff, d_in)
        nn.init.zeros_(self.up.bias)
        nn.init.normal_(self.up.weight, std=d_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def plants() -> Iterator[tuple[str, Layer, Tensor]]:
    """What is planted, the layer, and its inputs."""
    x = torch.randn(64, 64, 64)
    steep = torch.logspace(0, -4, 64)
    yield "as it begins", Layer(), x
    for power in (1, 3, 10, 15, 20, 100, 1000, 1e6):
        layer = Layer()
        nn.init.constant_(layer.up.bias, math.sqrt(power))
        yield f"the mean's power is {power:g} times the variance", layer, x
    for scale in (1e-3, 1e-6, 1e-20):
        yield f"u about {scale:g}", Layer(), scale * x
    yield "standard deviations of the inputs from 1 to 1e-4", Layer(), steep * x
    loud = x.clone()
    loud[0, 0] *= 1000
    yield "one token 1000 times as long", Layer(), loud
    first = x.clone()
    first[:, 0] = 100 * first[0, 0]
    yield "first tokens alike, 100 times as long", Layer(), first
    layer = Layer()
    with torch.no_grad():
        layer.up.weight[:4] *= 1000
    yield "four features 1000 times as loud", layer, x
    layer = Layer()
    with torch.no_grad():
        layer.up.weight[16:] = 0
    yield "all but 16 features dead", layer, x
    layer = Layer()
    with torch.no_grad():
        layer.up.weight *= 1e-6
        layer.up.bias.fill_(1.0)
    yield "constant once rounded", layer, x


def table_of_plants() -> None:
    print("\nplanted, 4096 tokens, 64 to 256: error of SE (nats), of PR (relative), of EEE and JS")
    for dtype in (torch.bfloat16, torch.float16):
        for name, layer, x in plants():
            ffns: list[FFN] = [FFNAdapter(0, "ffn", layer.up, layer.down)]
            ways = ((True, False), (PROJECTED, False), (PROJECTED, True))
            with torch.autocast("cpu", dtype):
                full, limited, always = (
                    measured(partial(layer, x), ffns, way, always=each) for way, each in ways
                )
            off = errors(always, full).iloc[0]
            taken = "projected" if "projected" in limited["precision"][0] else "pre itself"
            what = " ".join(f"{off[name]:8.1e}" for name in ("se_pre", "pr_pre", "eee_pre", "js"))
            kind = str(dtype).removeprefix("torch.")
            print(f"{kind:9} {name:50} {what}  {taken:10} {full['status'][0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="folder of the runs")
    parser.add_argument("--train", action="store_true", help="train those that are not there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--kept", type=int, nargs="+", default=[0, 10, 30, 100, 300])
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    table_of_plants()
    if args.train:
        train(args.runs, args.seeds, args.steps, args.kept)
    if args.runs is not None:
        found = [of_run(each) for each in sorted(args.runs.iterdir()) if each.is_dir()]
        print()
        table_of_runs(pd.concat(found, ignore_index=True))


if __name__ == "__main__":
    main()
