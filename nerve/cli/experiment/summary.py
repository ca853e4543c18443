"""What a run shows when it ends."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from nerve.cli.console import console, figure, say
from nerve.outliers import describe_outliers, outliers

_COLUMNS = ("se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js")


def print_summary(
    rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str], directory: Path
) -> None:
    """Prints the last measurement layer by layer, the run's figures, and how to load it.

    Args:
        rows: the rows of the last measurement, as in the `metrics` table.
        facts: figures of the run, label to text.
        directory: the run directory.
    """
    if rows:
        console().print(_layer_table(rows))
    for text in _outlying(rows):
        say(text)
    for label, text in facts.items():
        say(f"{label}: {text}")
    say(f"run directory: {directory}")
    say(f"in a notebook: import nerve; metrics = nerve.load_metrics({str(directory)!r})")


def _outlying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each spectrum that may be that of a few samples."""
    named: Iterable[str] = outliers(pd.DataFrame(rows)) if rows else ()
    return [
        f"layer {row['layer']} {row['ffn']}, {describe_outliers(row, site)}: few samples may "
        "decide this spectrum"
        for row, sites in zip(rows, named, strict=True)
        for site in filter(None, sites.split(", "))
    ]


def _layer_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    first = rows[0]
    n_samples = sorted({row["n_samples"] for row in rows})
    table = Table(
        title=f"FFN spectra at step {first['step']} "
        f"({' or '.join(f'{n:,}' for n in n_samples)} samples each)",
        caption="SE in nats, PR in dimensions, PR gain = post/pre, JS in nats",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # fits into 80 columns
        pad_edge=False,
    )
    one_a_layer = len({row["ffn"] for row in rows}) == 1
    table.add_column("layer" if one_a_layer else "layer, FFN")
    for name in (*_COLUMNS, "pr_gain"):
        table.add_column(name, justify="right")
    for row in rows:
        label = str(row["layer"]) if one_a_layer else f"{row['layer']} {row['ffn']}"
        gain = (
            row["pr_post"] / row["pr_pre"] if None not in (row["pr_pre"], row["pr_post"]) else None
        )
        table.add_row(label, *(figure(row[name]) for name in _COLUMNS), figure(gain))
        if row["status"] != "ok":
            table.add_row("", Text(row["status"], style="italic"))
    return table
