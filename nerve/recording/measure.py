"""`nerve.measure`: measures a model on batches; one row per FFN, optionally stored as a run."""

import gc
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from nerve.measuring.eigenproblem import FFNSpectra
from nerve.measuring.ffns import FFN
from nerve.measuring.forward import call
from nerve.measuring.given import (
    Loaded,
    check_batches,
    check_given,
    explicit,
    require_model,
    series_of,
)
from nerve.measuring.groups import Grouped
from nerve.measuring.masks import Masks
from nerve.measuring.measure import How, frame_of, spectra_of
from nerve.measuring.passes import bytes_of
from nerve.measuring.streams import count_tokens
from nerve.progress import Progress, shown, unseen
from nerve.recording.cadence import WeightedMean, loss_of
from nerve.recording.digest import SampleDigests
from nerve.recording.given import (
    check_labels,
    check_stored,
    check_token_counts,
    recorded_arguments,
)
from nerve.recording.measured_run import MeasuredRun, measured_run
from nerve.recording.run import seed_of
from nerve.recording.settings import require_shortcut

_FIND = "Give ffns=nerve.find_ffns(model, batch, {}=…)."


@explicit(
    layers=_FIND.format("layers"),
    select=_FIND.format("select"),
    config="Give labels=, which distinguish your runs.",
    source="The batches are measured in eval mode.",
)
def measure(
    model: nn.Module | Iterable[tuple[int, Loaded]],
    batches: Iterable[Any],
    *,
    into: str | os.PathLike[str] | None = None,
    step: int = 0,
    labels: Mapping[str, Any] | None = None,
    fingerprints: Mapping[str, str] | None = None,
    spectra: bool | str = True,
    resume: bool = False,
    ffns: Sequence[FFN] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    mask: Callable[[Any], Masks] | None = None,
    exclude: Collection[int] = (),
    only_labeled: bool = False,
    skip_first: int = 0,
    shortcut: bool | str = True,
    groups: Sequence[str] = (),
    sites: Sequence[str] = (),
    token_counts: Tensor | None = None,
    memory: int | str | None = None,
    progress: bool | Progress = False,
) -> pd.DataFrame:
    """Measures the FFNs of any torch model on batches, without Lightning or Hydra.

    The model runs in eval mode without gradients, uncompiled, and is left unchanged: weights,
    modes, hooks, compiled code and random states.

    Args:
        model: the model, on the device of the batches; or a series of (step, model), such as
            checkpoints, which are measured one after the other. A function that loads the model may
            be given in place of each model, so that only one at a time is in memory.
        batches: the batches that `forward` takes, pooled into one measurement. If `memory` requires
            several passes, they are iterated more than once and therefore kept in memory.
        into: a new run directory, where the results are stored in the same format as those of a
            training run, with the validation loss if the model returns a `loss` (weighted by
            `n_targets` if it returns that, too); comparisons leave out runs without a loss. The
            configuration of the run has `model`, the model's own configuration or its class;
            `weights` (per step), `batches` and `masks` (of `mask`), digests; and `measure`, the
            arguments, with the layers and names of `ffns`. What `forward` does is not recorded.
            `tokens_seen` is 0, since it is unknown.
        step: the training step of a single model that is stored with `into`.
        labels: further properties of the run, by name; they become columns of `nerve.load_runs` and
            identify the run with the arguments. A `seed`, if it is an integer, is the seed of the
            run.
        fingerprints: hashes, or other texts, that identify the `corpus` and the `tokenizer` of the
            batches, under these names; stored in the record, as nerve-run does, and as `text` in
            the configuration. Comparisons never pool runs that differ in them.
        spectra: whether to store the eigenvalues, too; `auto` for d_ff up to 1024.
        resume: continues the run in `into`, whether or not it is done: steps that it already has
            are neither loaded nor measured again. Labels, fingerprints, batches and arguments must
            be the same, except for `memory`, `progress` and `forward`, which is not recorded.
        ffns: descriptions of the FFNs; None for those that `nerve.find_ffns` finds with the first
            batch. To select some: `ffns=nerve.find_ffns(model, batch, select="*.mlp")`.
        forward: runs the model on one batch; by default `model(batch)`, or `model(**batch)` for a
            mapping.
        mask: returns a batch's mask, True (or 1) for samples that count, in the shape of the
            features without their last dimension, or flattened like them: one mask for all FFNs, or
            one for each, as a list or by FFN name; None counts all. By default the `attention_mask`
            and `decoder_attention_mask` of a mapping that has them (or the padding masks of
            nn.Transformer, `src_key_padding_mask` and `tgt_key_padding_mask`), each applied to the
            FFNs that receive those tokens.
        exclude: token ids to exclude, such as a tokenizer's `all_special_ids`; needs batches that
            are mappings with `input_ids`.
        only_labeled: excludes the tokens of a mapping whose `labels` are -100.
        skip_first: number of positions to skip at the beginning of each sequence, which account for
            most of the variance in many trained models. A sequence begins after its left padding,
            which the batch's own mask shows; without one, samples that `mask` excludes before all
            others of a sequence are padding.
        shortcut: whether pre may be computed from the covariance of the FFN's input where that is
            as exact and cheaper; False always uses the features themselves; `"projected"` also uses
            the input for 16-bit features, which omits the rounding of the features themselves and
            changes SE by less than 1e-3 nats: `precision` reports it.
        groups: groupings of the samples, among `position`, `frequency` and `halves`; each of their
            groups is measured separately, too, and stored in `into` for `nerve.load_groups`.
        sites: additional sites to measure, among `stream_in`, `input`, `output` and `stream_out`,
            stored likewise. If a model does not declare its residual stream, it is looked for in a
            forward pass of the first batch; a warning is logged if it is not found.
        token_counts: number of occurrences of each token id in the training text, for groups by
            frequency; None counts the tokens of the batches.
        memory: bytes of matrices to hold at once, as a number or as a string such as `8GiB`; each
            FFN needs two d_ff x d_ff matrices in float64. If not all fit, the model runs over the
            batches again for the remaining FFNs, with the same results. By default 8 GiB on a CPU
            and half of the free memory on a GPU, but at least what one FFN needs.
        progress: whether to show the progress of batches, passes and eigenproblems on stderr; or a
            function that is called with it, as (what, done, total or None).

    Returns:
        One row per FFN: layer, ffn, n_samples, d_ff, d_in; spectral entropy (se, nats),
        participation ratio (pr), eigenvalue early enrichment (eee), total variance, corrected pr,
        and the variance shares of the farthest sample, of the farthest 0.1% and of the mean, each
        _pre and _post; Jensen-Shannon divergence (js, nats); variance_outside; precision and
        status. Values that cannot be measured are NaN, and status gives the reason. Then the
        derived columns of `nerve.load_metrics`: exp_se, pr_gain, delta_eee and others, `outliers`,
        which names the sites whose spectrum may be dominated by a few samples, and `sampling`, by
        N/D (missing with `groups=["halves"]`: `nerve.load_metrics` then rates by these). For a
        series, the first column is the step; steps that were stored before have no rows.

    Raises:
        ConfigError: for a model, function or description of the wrong kind, duplicate steps, a
            single batch instead of a list, or labels with a reserved name.
        StoreError: if the directory holds another run, or without `resume` one that has measured
            something.
        MeasurementError: for a model without FFNs, no batches, or features, masks or descriptions
            that are inconsistent.
    """
    is_series = not isinstance(model, nn.Module)
    series = series_of(model, step)
    check_batches(batches)
    check_given(ffns=ffns, mask=mask, forward=forward, exclude=exclude)
    check_stored(into, step, spectra, resume, groups, sites, is_series=is_series)
    require_shortcut("shortcut", shortcut)
    check_labels(into, labels, fingerprints)
    check_token_counts(groups, token_counts, are_counted=True)
    labels, text = dict(labels or {}), dict(fingerprints or {})
    given = recorded_arguments(
        exclude=exclude,
        only_labeled=only_labeled,
        ffns=ffns,
        token_counts=token_counts,
    )
    if "frequency" in groups and token_counts is None:
        batches = list(batches)
        token_counts = count_tokens(batches)
    how = How(
        forward or call,
        mask,
        tuple(given["exclude"]),
        only_labeled,
        skip_first,
        shortcut,
        Grouped(tuple(groups), token_counts),
        tuple(sites),
    )
    if memory is not None:
        bytes_of(memory)
    batches = list(batches) if is_series else batches
    with ExitStack() as stack:
        run = None
        if into is not None:
            recorded = given | _as_recorded(how, spectra)
            asked = {**labels, "measure": recorded, **({"text": text} if text else {})}
            run = stack.enter_context(
                measured_run(
                    into, asked, spectra, resume=resume, seed=seed_of(labels), fingerprints=text
                )
            )
        show = stack.enter_context(shown()) if progress is True else progress or unseen
        return _measure_new(
            series, batches, how, show, is_series=is_series, run=run, ffns=ffns, memory=memory
        )


def _as_recorded(how: How, spectra: bool | str) -> dict[str, Any]:
    """The arguments as the configuration of the run records them, beside `recorded_arguments`; the
    last ones only if they are not the default."""
    lists = (("groups", how.grouped.groupings), ("sites", how.sites))
    return {
        "skip_first": how.skip_first,
        "shortcut": how.shortcut,
        "mask": how.mask is not None,
        **{name: list(each) for name, each in lists if each},
        **({} if spectra is True else {"spectra": spectra}),
    }


def _measure_new(
    series: Iterable[tuple[int, Loaded]],
    batches: Iterable[Any],
    how: How,
    progress: Progress,
    *,
    is_series: bool,
    run: MeasuredRun | None,
    **given: Any,
) -> pd.DataFrame:
    """Measures each model of a series whose step the run does not have, and returns their rows;
    with `is_series`, they have a column `step`. `given` are further arguments of `measure_one`.

    Raises:
        StoreError: if the run has steps that were measured on other batches.
    """
    if run is not None and run.steps and isinstance(batches, Sequence):
        # Before anything is loaded, and even if no step is left.
        samples = SampleDigests(how.mask)
        for batch in batches:
            if samples.mask is not None:
                samples.mask(batch)
            samples.add(batch)
        run.require_same(samples.as_config())
    frames = [_frame_of((), 0, how, is_series=is_series)]
    for at, loaded in series:
        if run is not None and at in run.steps:
            continue
        tell = _prefixed(progress, f"step {at}: " if is_series else "")
        found = measure_one(loaded, batches, how, progress=tell, run=run, step=at, **given)
        frames.append(_frame_of(found, at, how, is_series=is_series))
        if is_series:
            del loaded
            gc.collect()  # hooks and graphs may keep a model until then
    return pd.concat(frames[1:] or frames, ignore_index=True)


def _frame_of(
    spectra: Iterable[FFNSpectra], step: int, how: How, *, is_series: bool
) -> pd.DataFrame:
    """The rows of a model; those of a series with their step."""
    rows = frame_of(spectra)
    if "halves" in how.grouped.groupings:  # then nerve.load_metrics judges from these
        rows = rows.assign(sampling=np.array(np.nan, object))
    if is_series:
        rows.insert(0, "step", step)
    return rows


def measure_one(
    model: Loaded,
    batches: Iterable[Any],
    how: How,
    *,
    ffns: Sequence[FFN] | None,
    memory: int | str | None,
    progress: Progress,
    run: MeasuredRun | None,
    step: int,
    tokens_seen: int = 0,
) -> list[FFNSpectra]:
    """Measures one model, and stores the result if there is a run. The arguments are those of
    `measure`."""
    loaded = model if isinstance(model, nn.Module) else model()
    require_model(loaded)
    loss, samples = WeightedMean(), SampleDigests(how.mask)

    def give(batch: Any, output: object) -> None:
        if run is not None:
            samples.add(batch)
        found = loss_of(output)
        if found is not None:
            loss.add(*found)

    how = replace(how, mask=samples.mask)
    spectra, groups = spectra_of(
        loaded, batches, how, ffns=ffns, memory=memory, progress=progress, give=give
    )
    if run is not None:
        run.add(step, loaded, samples.as_config(), spectra, loss.value(), tokens_seen, groups)
    return spectra


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda what, done, total: progress(prefix + what, done, total)
