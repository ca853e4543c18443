"""The end of a run: its results, and the summary that is printed."""

import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from nerve.cli.console import console, figure, say, say_next
from nerve.derived import describe_outliers, with_derived
from nerve.errors import StoreError
from nerve.metric_names import MEASURED, columns_of, shown_in
from nerve.recording.writer import mean_values
from nerve.storage.directory import RunDirectory
from nerve.storage.parts import read_parts, warn_damaged
from nerve.storage.record import RunRecord
from nerve.storage.schema import DATASETS
from nerve.training.checkpoint_files import drop_all_but_weights

log = logging.getLogger(__name__)


def objective_of(run: RunDirectory, name: str) -> float:
    """The number that `objective` names, for a run that is done.

    A score is from the last validation; a metric is its mean over layers in the last measurement,
    NaN if nothing could be measured.
    """
    score = run.require_record().final.get(name)
    if score is not None:
        return score
    table, damaged = read_parts(run.path, DATASETS["metrics"], run.require_record().run_id)
    warn_damaged(damaged)
    rows = table.select(["step", "ffn", *MEASURED]).to_pylist()
    last = max((row["step"] for row in rows), default=None)
    return mean_values(row for row in rows if row["step"] == last).get(name, math.nan)


def finish(
    run: RunDirectory,
    record: RunRecord,
    final: dict[str, float],
    reason: str | None,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Records that the run is done, reduces its last checkpoint to what readers need, and prints
    the results.

    Args:
        final: the final values for the record.
        reason: why training ended before its last step; None if it did not.
        rows: those of the last measurement.
    """
    warning = warning_of(final["val_loss"], record.unigram_loss)
    record.finish("done", final=final, stopped_by=reason, warning=warning)
    try:
        drop_all_but_weights(run.checkpoint("last"))
    except StoreError as refused:  # the run is done all the same
        log.warning("the last checkpoint could not be reduced to the weights: %s", str(refused))
    print_summary(rows, facts_of(final, warning))
    if record.sweep is None:
        say(f"run directory: {shlex.quote(str(run.path))}")
        say_next(run.path)


def final_scores(val_loss: float | None, scores: dict[str, float], data: Any) -> dict[str, float]:
    """The scores of the last validation, which follows the last step."""
    assert val_loss is not None
    final = {**scores, "val_loss": val_loss}
    if hasattr(data, "n_heldout_bytes"):
        bits = val_loss * data.n_heldout_tokens / math.log(2)
        final["bits_per_byte"] = bits / data.n_heldout_bytes
    return final


def print_summary(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> None:
    """Prints the last measurement layer by layer, and the results of the run.

    Args:
        rows: the rows of the last measurement, as in the `metrics` table.
        facts: figures of the run, label to text.
    """
    if rows:
        derived = with_derived(pd.DataFrame(rows)).to_dict("records")
        console().print(_layer_table(derived))
        for text in _outlying(derived):
            say(text)
    for label, text in facts.items():
        say(f"{label}: {text}")


def warning_of(val_loss: float, unigram_loss: float | None) -> str | None:
    """A warning if the run has learned nothing, even though its loss is finite."""
    if unigram_loss is None or val_loss < unigram_loss:
        return None
    return (
        f"untrained: the loss of {val_loss:.4g} nats is not below {unigram_loss:.4g}, the "
        "loss of the token frequencies alone"
    )


def facts_of(final: Mapping[str, float], warning: str | None) -> dict[str, str]:
    """The results of a run, from label to text."""
    loss = f"{final['val_loss']:.3f} nats per target"
    if "bits_per_byte" in final:
        loss += f", {final['bits_per_byte']:.3f} bits per byte"
    facts = {"validation loss": loss} | ({"warning": warning} if warning else {})
    if "val_accuracy" in final:
        facts["validation accuracy"] = f"{final['val_accuracy']:.4f}"
    share = final["measuring_seconds"] / final["train_seconds"]
    return facts | {
        "time": f"{final['train_seconds']:.1f} s, of which measuring and validating "
        f"{final['measuring_seconds']:.1f} s ({share:.1%})",
    }


def _outlying(rows: Sequence[Mapping[Any, Any]]) -> list[str]:
    """A line for each spectrum that a few samples may dominate."""
    return [
        f"a few samples may dominate the spectrum of {site} in layer {row['layer']} "
        f"({row['ffn']}): {describe_outliers(row, site)}"
        for row in rows
        for site in filter(None, row["outliers"].split(", "))
    ]


def _layer_table(rows: Sequence[Mapping[Any, Any]]) -> Table:
    first = rows[0]
    n_samples = sorted({row["n_samples"] for row in rows})
    table = Table(
        title=f"FFN spectra at step {first['step']} "
        f"({' or '.join(f'{n:,}' for n in n_samples)} samples each)",
        caption=", ".join(metric.label for metric in shown_in("summary")),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # fits into 80 columns
        pad_edge=False,
    )
    one_a_layer = len({row["ffn"] for row in rows}) == 1
    table.add_column("layer" if one_a_layer else "layer, FFN")
    columns = columns_of(lambda metric: "summary" in metric.shown)
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        label = str(row["layer"]) if one_a_layer else f"{row['layer']} {row['ffn']}"
        table.add_row(label, *(figure(row[name]) for name in columns))
        if row["status"] != "ok":
            table.add_row("", Text(row["status"], style="italic"))
    return table
