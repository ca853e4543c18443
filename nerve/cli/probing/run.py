"""Measures checkpoints one by one into one run, and shows what came of it."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd
from torch import nn

from nerve.analysis.load import load_metrics
from nerve.cli.console import say
from nerve.cli.experiment.summary import print_summary
from nerve.cli.probing.source import Asked, Checkpoint, Data, Source
from nerve.errors import DataError, StoreError
from nerve.measuring.find import FoundFFNs
from nerve.measuring.measure import spectra_of
from nerve.recording.cadence import WeightedMean
from nerve.recording.digest import weights_digest
from nerve.recording.losses import loss_of
from nerve.recording.series import Measured, Series, measured_of, series_run
from nerve.storage.identity import config_id
from nerve.storage.record import RECORD_NAME

OUTPUTS = Path("outputs", "probe")
"""Where runs go that are not told where."""


class Progress(Protocol):
    """Gets what is being done, and how much of how much is done."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def source_of(asked: Asked) -> Source:
    """What is to be probed. Raises `NerveError` for what cannot be."""
    if any(Path(model, RECORD_NAME).is_file() for model in asked.models):
        from nerve.cli.probing.runs import KeptCheckpoints  # Hydra and Lightning

        return KeptCheckpoints(asked)
    from nerve.cli.probing.folders import Folders

    return Folders(asked)


class Opened(NamedTuple):
    """A checkpoint whose model is in memory, and its FFNs."""

    checkpoint: Checkpoint
    model: nn.Module
    ffns: FoundFFNs


def opened(source: Source, checkpoint: Checkpoint) -> Opened:
    """Loads a checkpoint and finds its FFNs. Raises as the source."""
    model = source.load(checkpoint)
    return Opened(checkpoint, model, source.find(model))


def probe(source: Source, *, spectra: bool, output: str | None, progress: Progress) -> None:
    """Measures what is not measured yet, and prints the layers of the last step.

    Args:
        source: what is probed.
        spectra: whether eigenvalues are stored.
        output: the run directory; None for one that is named after the model and what is asked.
        progress: told of each batch.

    Raises:
        NerveError: for what the user can fix; what was measured before stays.
    """
    total = len(source.checkpoints)
    progress(f"loading {source.checkpoints[0].place}", 0, total)
    now: Opened | None = opened(source, source.checkpoints[0])
    assert now is not None
    for line in now.ffns.unclear:
        say(f"not measured; by hand, if it is an FFN: {line}")
    data, table = source.data(now.model, now.ffns), now.ffns.table()
    directory = Path(output or OUTPUTS / f"{source.name}-{config_id(data.config)}")
    before, n_new = measured_of(directory, data.config), 0
    left = _left(source.checkpoints, before)
    first = {"n_parameters": sum(each.numel() for each in now.model.parameters()), **data.record}
    if left or not before.is_done:
        with series_run(directory, data.config, spectra=spectra, **first) as series:
            for number, checkpoint in enumerate(left, total - len(left)):
                if now is None or now.checkpoint != checkpoint:
                    now = None  # one at a time is in memory
                    progress(f"loading {checkpoint.place}", number, total)
                    now = opened(source, checkpoint)
                _require_alike(now, table)
                say_what = partial(progress, done=number, total=total)
                n_new += _measure(series, now, data, say_what)
                now = None
    now = None
    _show(directory, table, data, total - n_new)


def _left(checkpoints: Sequence[Checkpoint], before: Measured) -> list[Checkpoint]:
    """Those that are not measured yet, or whose files may be others than those that were."""
    return [
        each
        for each in checkpoints
        if before.began is None
        or each.step not in before.digests
        or not each.is_older_than(before.began)
    ]


def _require_alike(now: Opened, table: pd.DataFrame) -> None:
    if not now.ffns.table().equals(table):
        raise DataError(
            f"The checkpoints of a series are of one model; the FFNs of {now.checkpoint.place} are "
            "others than those of the first. Probe it apart."
        )


def _measure(series: Series, now: Opened, data: Data, say_what: Callable[[str], None]) -> bool:
    """Measures a checkpoint, unless these very weights have been; says whether it did."""
    step, digest = now.checkpoint.step, weights_digest(now.model)
    known = series.digests.get(step)
    if known == digest:
        return False
    if known is not None:
        raise StoreError(
            f"A step is of one model; step {step} was measured with other weights than those that "
            f"are in {now.checkpoint.place} now. Choose another directory with -o."
        )
    loss = WeightedMean()

    def give(output: object) -> None:
        found = loss_of(output)
        if found is not None:
            loss.add(*found)

    def counted() -> Iterator[Any]:
        for i, batch in enumerate(data.batches, 1):
            say_what(f"step {step}: batch {i} of {len(data.batches)}")
            series.beat()
            yield batch

    spectra = spectra_of(
        now.model,
        counted(),
        ffns=now.ffns,
        forward=data.forward,
        mask=None,
        exclude=(),
        only_labeled=False,
        skip_first=data.skip_first,
        shortcut=data.shortcut,
        give=give,
    )
    labels = {"step": step, "tokens_seen": data.tokens_seen(step), "val_loss": loss.value()}
    series.add(labels, spectra, digest)
    return True


def _show(directory: Path, table: pd.DataFrame, data: Data, n_before: int) -> None:
    """Prints the layers of the last step, what is flagged, and how to go on."""
    metrics = load_metrics(directory)
    steps = sorted(set(metrics["step"]))
    last = metrics[metrics["step"] == steps[-1]]
    n_samples, widest = int(last["n_samples"].max()), int(table["d_ff"].max())
    facts = {
        "steps": f"{len(steps)} ({', '.join(map(str, steps[:8]))}{', …' if steps[8:] else ''})"
        + (f", of which {n_before} had been measured before" if n_before else ""),
        "samples": f"{n_samples:,}, N/D = {n_samples / widest:.1f} for the widest FFN (d_ff "
        f"{widest:,})",
    }
    loss = last["val_loss"].iloc[0]
    if pd.notna(loss):
        facts["loss"] = f"{loss:.3f} nats per target"
    n_flagged = int((metrics["outliers"] != "").sum())
    if n_flagged:
        hint = "" if data.skip_first else "; --skip-first 1 leaves the first tokens out"
        facts["flagged"] = f"{n_flagged} of {len(metrics)} rows may be those of few samples{hint}"
    print_summary(last.to_dict("records"), facts, directory)
    say(f"for the report: nerve-report {shlex.quote(str(directory))}")
