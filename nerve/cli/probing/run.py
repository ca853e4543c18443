"""Measures checkpoints one by one into one run, and prints the results."""

import gc
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from torch import nn

from nerve.analysis.load import load_metrics
from nerve.cli.console import say, say_next
from nerve.cli.directories import ProbeDirectory
from nerve.cli.experiment.summary import print_summary
from nerve.cli.probing.source import Checkpoint, Data, ProbeArguments, Source
from nerve.errors import DataError, NerveError, NotFiniteError, StoreError
from nerve.measuring.found import FoundFFNs
from nerve.measuring.measure import How
from nerve.progress import Progress
from nerve.recording.measure import measure_one
from nerve.recording.measured_run import (
    Measured,
    MeasuredRun,
    measured_of,
    measured_run,
    weights_of,
)
from nerve.storage.identity import config_id
from nerve.storage.record_file import RECORD_NAME

OUTPUTS = Path("outputs", "probe")
"""The default parent directory of runs."""

_SHOWN = 5
"""The most checkpoints that a message names."""


def source_of(args: ProbeArguments) -> Source:
    """The source to probe. Raises `NerveError` if there cannot be one."""
    if any(Path(model, RECORD_NAME).is_file() for model in args.models):
        from nerve.cli.probing.runs import KeptCheckpoints  # Hydra and Lightning

        return KeptCheckpoints(args)
    from nerve.cli.probing.folders import Folders

    return Folders(args)


class Opened(NamedTuple):
    """A checkpoint whose model is in memory, with its FFNs."""

    checkpoint: Checkpoint
    model: nn.Module
    ffns: FoundFFNs


def listing(source: Source, progress: Progress) -> str:
    """The table of the FFNs of the first checkpoint that can be loaded."""
    return str(_first(source, {}, progress).ffns)


def probe(source: Source, args: ProbeArguments, *, output: str | None, progress: Progress) -> None:
    """Measures what has not been measured yet, and prints the layers of the last step.

    Checkpoints of a series that cannot be loaded, or whose features are not finite, are left out:
    the others are measured, and then the run fails with an error that names them.

    Args:
        source: what is probed.
        args: the arguments of the command.
        output: the run directory; None for one named after the model and the arguments.
        progress: receives the progress of checkpoints, batches and eigenproblems.

    Raises:
        NerveError: for errors that the user can fix; other measurements are kept.
    """
    damaged: dict[Checkpoint, NerveError] = {}
    now: Opened | None = _first(source, damaged, progress)
    assert now is not None
    for line in now.ffns.unclear:
        say(f"not measured; if it is an FFN, describe it by hand: {line}")
    data, table = source.data(now.model, now.ffns), now.ffns.table()
    directory = Path(output or OUTPUTS / f"{source.name}-{config_id(data.config)}")
    before = measured_of(ProbeDirectory(directory), data.config)
    left = _left(source.checkpoints, before)
    damaged = {each: damaged[each] for each in left if each in damaged}  # others are measured
    left = [each for each in left if each not in damaged]
    n_new, incomplete = 0, None
    try:
        if left or damaged or not before.is_done:
            with measured_run(
                directory, data.config, args.spectra, resume=True, **data.record
            ) as run:
                assert run is not None  # in a single process
                for number, checkpoint in enumerate(left):
                    if now is None or now.checkpoint != checkpoint:
                        now = None  # keeps only one in memory
                        gc.collect()  # hooks and graphs may keep a model until then
                        progress(f"loading {checkpoint.place}", number, len(left))
                        now = _loaded(source, checkpoint, damaged)
                    if now is not None:
                        _require_alike(now, table)
                        n_new += _measure(run, now, data, args.memory, progress)
                        now = None
                if damaged:
                    incomplete = _incomplete(damaged, len(source.checkpoints))
                    raise incomplete
    except DataError as error:
        if error is incomplete:
            _show(directory, data, n_new)
        raise
    _show(directory, data, n_new)


def _first(source: Source, damaged: dict[Checkpoint, NerveError], progress: Progress) -> Opened:
    """The first checkpoint that can be loaded; those before it are added to `damaged`."""
    for checkpoint in source.checkpoints:
        progress(f"loading {checkpoint.place}", 0, len(source.checkpoints))
        found = _loaded(source, checkpoint, damaged)
        if found is not None:
            return found
    raise damaged[source.checkpoints[0]]


def _loaded(
    source: Source, checkpoint: Checkpoint, damaged: dict[Checkpoint, NerveError]
) -> Opened | None:
    """A checkpoint with its FFNs; None for one that cannot be loaded or has diverged, which is
    added to `damaged`."""
    try:
        model = source.load(checkpoint)
        return Opened(checkpoint, model, source.find(model))
    except (DataError, StoreError, NotFiniteError) as error:
        damaged[checkpoint] = error
        return None


def _incomplete(damaged: Mapping[Checkpoint, NerveError], n_checkpoints: int) -> DataError:
    """The error that names the checkpoints that are left out."""
    some = [f"step {each.step}: {str(error).rstrip('.')}" for each, error in damaged.items()]
    more = f" (and {len(some) - _SHOWN} more)" if len(some) > _SHOWN else ""
    return DataError(
        f"The checkpoints of a series must be readable, with finite features; {len(some)} of "
        f"{n_checkpoints} are not, so only the others are measured: {'; '.join(some[:_SHOWN])}"
        f"{more}. Restore or omit them, and repeat the command."
    )


def _left(checkpoints: Sequence[Checkpoint], before: Measured) -> list[Checkpoint]:
    """The checkpoints that are not measured yet, or whose files may have changed since."""
    return [
        each
        for each in checkpoints
        if before.began is None
        or each.step not in before.steps
        or not each.is_older_than(before.began)
    ]


def _require_alike(now: Opened, table: pd.DataFrame) -> None:
    if not now.ffns.table().equals(table):
        raise DataError(
            f"The checkpoints of a series must be of one model; the FFNs of {now.checkpoint.place} "
            "differ from those of the first. Probe it separately."
        )


def _measure(
    run: MeasuredRun, now: Opened, data: Data, memory: str | None, progress: Progress
) -> bool:
    """Measures a checkpoint, unless the same weights have been measured; returns whether it did."""
    step = now.checkpoint.step
    known = run.steps.get(step)
    if known is not None:
        if known == str(weights_of(now.model)):
            return False
        raise StoreError(
            f"A step has one set of weights; step {step} was measured with different weights than "
            f"{now.checkpoint.place} has now. Choose another directory with -o."
        )

    def tell(what: str, done: int, total: int | None) -> None:
        progress(f"step {step}: {what}", done, total)

    measure_one(
        now.model,
        data.batches,
        How(
            data.forward,
            None,
            (),
            False,
            data.skip_first,
            data.shortcut,
            data.grouped,
            data.sites,
        ),
        ffns=now.ffns,
        memory=memory,
        progress=tell,
        run=run,
        step=step,
        tokens_seen=data.tokens_seen(step),
    )
    return True


def _show(directory: Path, data: Data, n_new: int) -> None:
    """Prints the layers of the last step, what is flagged, and how to continue."""
    metrics = load_metrics(directory)
    steps = sorted(set(metrics["step"]))
    n_before = len(steps) - n_new
    last = metrics[metrics["step"] == steps[-1]]
    facts = {"text": data.text} if data.text else {}
    facts |= {
        "steps": f"{len(steps)} ({', '.join(map(str, steps[:8]))}{', …' if steps[8:] else ''})"
        + (f", of which {n_before} were measured before" if n_before else ""),
        "samples per unit of d_ff (N/D)": _range_of(last["n_samples"] / last["d_ff"]),
    }
    loss = last["val_loss"].iloc[0]
    if pd.notna(loss):
        facts["loss"] = f"{loss:.3f} nats per target"
    n_flagged = int((metrics["outliers"] != "").sum())
    if n_flagged:
        hint = "" if data.skip_first else "; --skip-first 1 excludes the first tokens"
        facts["flagged"] = (
            f"{n_flagged} of {len(metrics)} rows may be dominated by a few samples{hint}"
        )
    print_summary(last.to_dict("records"), facts)
    say(f"run directory: {shlex.quote(str(directory))}")
    say_next(directory)


def _range_of(values: pd.Series) -> str:
    least, most = f"{values.min():.1f}", f"{values.max():.1f}"
    return most if least == most else f"{least} to {most}"
