"""Are rows flagged that are those of a few samples, and only these?

Plants: an FFN on random inputs, one token or the first token of every sequence replaced by a vector
of 3 to 1,000 times the median norm, before or after the nonlinearity. Every one that moves PR by
more than 10% should be flagged. Runs: the rows after step 0 of the runs below; few should be.

    python benchmarks/outliers.py                        # the plants
    python benchmarks/outliers.py --train --runs FOLDER  # trains the runs, about a minute each
    python benchmarks/outliers.py --runs FOLDER          # the plants and the rows of the runs

With another --seed, and a folder of its own, the runs are twelve new ones.
"""

import argparse
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import nerve
from nerve.derived import LARGEST_MOVES
from nerve.measuring.ffns import FFNAdapter
from nerve.sites_and_groups import SITES

RUNS = (
    *(
        f"normalization={normalization} activation={activation}"
        for normalization in ("preln", "postln", "mixln", "rmsnorm", "normfree")
        for activation in ("gelu", "relu")
    ),
    "activation=learnable_leaky_relu",
    "model=mixer_tiny",
)
"""Overrides of the twelve runs of a seed, fixed before the first of them."""

FACTORS = (3, 5, 10, 30, 100, 300, 1000)
N_SEQUENCES, SEQ_LEN, D_MODEL, D_FF = 32, 128, 128, 512


class Planted(nn.Module):
    """An FFN that puts a vector into its features at one site."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D_MODEL, D_FF), nn.Linear(D_FF, D_MODEL)
        with torch.no_grad():
            self.up.weight *= 3 * torch.linspace(0, spread, D_MODEL).neg().exp()
        self.site, self.sequences, self.position, self.factor = "pre", slice(0), 0, 0.0
        self.direction = torch.randn(D_FF)
        self.up.register_forward_hook(lambda module, inputs, pre: self.plant("pre", pre))
        self.down.register_forward_pre_hook(lambda module, inputs: self.plant("post", *inputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))

    def plant(self, site: str, features: Tensor) -> Tensor:
        if site == self.site:
            norm = self.factor * features.norm(dim=-1).median()
            features = features.clone()
            features[self.sequences, self.position] = norm * self.direction / self.direction.norm()
        return features

    def row(self, x: Tensor) -> dict[str, object]:
        ffns = [FFNAdapter(0, "ffn", self.up, self.down)]
        return nerve.measure(self, [x], ffns=ffns).iloc[0].to_dict()


def plants() -> pd.DataFrame:
    """One row a plant: what was planted, whether it moved PR, and whether it was flagged."""
    rows = []
    for seed, spread in enumerate((0.0, 2.0, 5.0, 10.0)):
        torch.manual_seed(seed)
        model, x = Planted(spread), torch.randn(N_SEQUENCES, SEQ_LEN, D_MODEL)
        clean = model.row(x)
        for site, factor, position, every in itertools.product(
            SITES, FACTORS, (0, 57), (False, True)
        ):
            model.site, model.factor, model.position = site, factor, position
            model.sequences = slice(None) if every else slice(5, 6)
            row = model.row(x)
            model.sequences = slice(0)
            moved = abs(row[f"pr_{site}"] / clean[f"pr_{site}"] - 1) > LARGEST_MOVES
            rows.append(
                {
                    "tokens": "in every sequence" if every else "one",
                    "site": site,
                    "factor": factor,
                    "moved": moved,
                    "flagged": site in row["outliers"].split(", "),
                }
            )
    return pd.DataFrame(rows)


def train(folder: Path, side_by_side: int, seed: int) -> None:
    """Trains the runs that are not done."""

    def start(overrides: str) -> None:
        directory = folder / overrides.replace(" ", ",")
        command = [sys.executable, "-m", "nerve.cli.run", *overrides.split(), f"seed={seed}"]
        command += [f"hydra.run.dir='{directory}'", "trainer.enable_progress_bar=false"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(start, RUNS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, help="folder of the twelve runs")
    parser.add_argument("--train", action="store_true", help="train those that are not done")
    parser.add_argument("--side-by-side", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the runs that --train trains")
    args = parser.parse_args()
    found = plants()
    for tokens, rows in found.groupby("tokens"):
        moved = rows[rows["moved"]]
        print(
            f"plants, {tokens}: {moved['flagged'].sum()} flagged of {len(moved)} that move PR by "
            f"more than {LARGEST_MOVES:.0%}; {rows['flagged'].sum()} of {len(rows)} in all"
        )
        missed = moved[~moved["flagged"]]
        if len(missed):
            print(f"  missed: {missed.groupby(['site', 'factor']).size().to_dict()}")
    if args.runs is None:
        return
    if args.train:
        train(args.runs, args.side_by_side, args.seed)
    rows = nerve.load_metrics(args.runs)
    rows = rows[rows["step"] > 0]
    flagged = rows[rows["outliers"] != ""]
    unknown = rows[[f"top_share_{site}" for site in SITES]].isna().any(axis=1) & (
        rows["status"] == "ok"
    )
    print(
        f"runs: {len(flagged)} of {len(rows)} rows flagged ({len(flagged) / len(rows):.2%}) in "
        f"{rows['run_id'].nunique()} runs; shares not known in {unknown.sum()}"
    )
    names = ["run_id", "layer", "ffn", "outliers"]
    print(flagged.groupby(names, observed=True).size().to_string() if len(flagged) else "")


if __name__ == "__main__":
    main()
