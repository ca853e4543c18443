"""`nerve.measure`: a model and batches to one row an FFN, and to a run that stays."""

import gc
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pandas as pd
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nerve.config import require, require_count, require_several
from nerve.measuring.eigenproblem import FFNSpectra
from nerve.measuring.ffns import FFN
from nerve.measuring.forward import call
from nerve.measuring.given import (
    Loaded,
    check_batches,
    check_given,
    require_mapping,
    require_model,
    series_of,
)
from nerve.measuring.groups import Grouped
from nerve.measuring.masks import Masks
from nerve.measuring.measure import How, frame_of, spectra_of
from nerve.measuring.passes import bytes_of
from nerve.measuring.streams import count_tokens
from nerve.metric_names import AROUND, GROUPS
from nerve.progress import Progress, shown, unseen
from nerve.recording.cadence import WeightedMean, loss_of
from nerve.recording.measured_run import OWN, Digest, MeasuredRun, measured_run
from nerve.recording.settings import require_shortcut
from nerve.storage.schema import METRICS

_ASKED = ("exclude", "only_labeled", "skip_first", "shortcut")
"""What the configuration of the run has of `How` as it is."""


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
    """Measures the FFNs of any torch model over batches; neither Lightning nor Hydra is needed.

    The model runs in eval mode without gradients, uncompiled, and is left as it was: weights,
    modes, hooks, compiled code and random states.

    Args:
        model: the model, on the device of the batches; or a series of (step, model), such as
            checkpoints, which are measured one after the other. In place of a model stands a
            function that loads it, so that one at a time is in memory.
        batches: what `forward` takes; all of them make one measurement. They are gone through more
            than once where `memory` asks for it, and are then held.
        into: a run directory, which must be new: what is measured is stored there as a run stores
            it, with the validation loss where the model returns a `loss` (weighted by `n_targets`
            where that is there, too). Its configuration has `model`, the model's own or its class;
            `weights` (for each step) and `batches`, digests; and `measure`, what was asked.
            `tokens_seen` is 0, as nothing says it.
        step: of a single model that goes into a run, the step that it is of.
        labels: what else tells the run apart, by name; they are columns of `nerve.load_runs`.
        fingerprints: hashes of the `corpus` and the `tokenizer` that the batches are of, by these
            names: of the record, as a run of `nerve-run` has them, and of the configuration.
        spectra: whether eigenvalues are stored, too; `auto` for d_ff up to 1024.
        resume: goes on with the run that is there, done or not: steps that it has are not measured
            again, nor loaded. Labels, fingerprints and what was asked must be the same.
        ffns: descriptions of the FFNs; None for what `nerve.find_ffns` finds with the first batch.
            Some of these: `ffns=nerve.find_ffns(model, batch, select="*.mlp")`.
        forward: runs the model on one batch; by default `model(batch)`, or `model(**batch)` for a
            mapping.
        mask: gives a batch's mask, True (or 1) for the samples that count, in the shape of the
            features without their last dimension or flattened as they are: one for all FFNs, or one
            for each as a list or by the FFN's name; None counts all. By default the
            `attention_mask` and `decoder_attention_mask` of a mapping that has them, each for the
            FFNs that get those tokens.
        exclude: token ids that do not count, such as a tokenizer's `all_special_ids`; of the
            `input_ids` of a mapping.
        only_labeled: leaves out the tokens of a mapping whose `labels` are -100.
        skip_first: leaves out so many positions at the beginning of each sequence, which in many
            trained models hold most of the variance.
        shortcut: whether pre may be computed from the covariance of the FFN's input where that is
            as exact and cheaper; False always takes the features themselves; `"projected"` takes
            the input of 16-bit features, too, and leaves their own rounding out, which moves SE by
            less than 1e-3 nats: `precision` says so.
        groups: groupings of the samples, of `position`, `frequency` and `halves`, whose groups are
            measured by themselves as well and stored in `into`, where `nerve.load_groups` reads
            them.
        sites: of `stream_in`, `input`, `output` and `stream_out` those that are measured as well,
            likewise; where a model does not say where its residual stream is, one forward pass of
            the first batch shows it, or a warning says that it does not.
        token_counts: how often each token id occurs in the text that the model learned from, for
            groups by frequency; None counts the batches.
        memory: bytes of matrices that are held at once, as a number or as a text such as `8GiB`:
            two of d_ff x d_ff in float64 for each FFN. Where all do not fit, the model runs over
            the batches again for those that are left; values are the same. By default 8 GiB on a
            CPU, and half of what is free on a GPU, or what one FFN takes.
        progress: whether batches, passes and eigenproblems are shown on stderr; or what is told of
            them, as (what, done, total or None).

    Returns:
        One row per FFN: layer, ffn, n_samples, d_ff, d_in; spectral entropy (se, nats),
        participation ratio (pr), eigenvalue early enrichment (eee), total variance and corrected
        pr, shares of the farthest sample, of the farthest 0.1% and of the mean, each _pre and
        _post; Jensen-Shannon divergence (js, nats); variance_outside; precision and status. NaN
        where nothing can be measured, status says why. `outliers` names the sites whose spectrum
        may be that of a few samples. Of a series the first column is the step, and steps that were
        there already have no rows.

    Raises:
        ConfigError: for a model, functions or descriptions that are of another kind, steps that
            are there twice, one batch in place of a list, or labels with a name that is taken.
        StoreError: for a directory that has another run, or one that is done.
        MeasurementError: for a model without FFNs, no batches, or features, masks or descriptions
            that are not what they are said to be.
    """
    is_series = not isinstance(model, nn.Module)
    series = series_of(model, step)
    check_batches(batches)
    check_given(ffns=ffns, mask=mask, forward=forward, exclude=exclude)
    _check_stored(into, step, spectra, resume, groups, sites, is_series=is_series)
    require_shortcut("shortcut", shortcut)
    require_mapping("labels", labels)
    require_mapping("fingerprints", fingerprints)
    labels, text = dict(labels or {}), dict(fingerprints or {})
    _check_labels(labels)
    if "frequency" in groups and token_counts is None:
        batches = list(batches)
        token_counts = count_tokens(batches)
    how = How(
        forward or call,
        mask,
        tuple(exclude),
        only_labeled,
        skip_first,
        shortcut,
        Grouped(tuple(groups), token_counts),
        tuple(sites),
    )
    if memory is not None:
        bytes_of(memory)
    batches, frames = list(batches) if is_series else batches, []
    with ExitStack() as stack:
        run = None
        if into is not None:
            recorded = {"measure": _as_recorded(how), **({"text": text} if text else {})}
            asked = {**labels, **recorded}
            run = stack.enter_context(
                measured_run(into, asked, spectra, resume=resume, fingerprints=text)
            )
        show = stack.enter_context(shown()) if progress is True else progress or unseen
        for at, loaded in series:
            if run is not None and at in run.steps:
                continue
            which = f"step {at}: " if is_series else ""
            tell = _prefixed(show, which)
            found = measure_one(
                loaded, batches, how, ffns=ffns, memory=memory, progress=tell, run=run, step=at
            )
            frames.append(frame_of(found))
            if is_series:
                frames[-1].insert(0, "step", at)
                del loaded
                gc.collect()  # hooks and graphs may keep a model until then
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _check_stored(
    into: str | os.PathLike[str] | None,
    step: int,
    spectra: bool | str,
    resume: bool,
    groups: Sequence[str],
    sites: Sequence[str],
    *,
    is_series: bool,
) -> None:
    """Checks what `measure` is to store, and that there is a run for it.

    Raises:
        ConfigError: for a value that is out of range, or that only a run takes.
    """
    require_count("step", step, least=0)
    require(
        step == 0 or (into is not None and not is_series),
        f"step= labels the rows of a single model that are stored with into=; got step={step} "
        f"{'and a series, which has its own' if is_series else 'without into='}. Leave it out.",
    )
    require(spectra in (True, False, "auto"), f"spectra is true, false or 'auto'; got {spectra!r}.")
    require(not resume or into is not None, "resume=True goes on with the run of into=; got none.")
    for name, each, options in (("groups", groups, GROUPS), ("sites", sites, AROUND)):
        require_several(name, each, options)
    require(
        into is not None or not (groups or sites),
        "Groups and sites are stored in a run, for nerve.load_groups; got none. Give into=.",
    )


def _check_labels(labels: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for a label with a name that is taken."""
    taken = sorted(labels.keys() & {*OWN, *METRICS.names})
    require(
        not taken,
        f"labels are named otherwise than {', '.join(OWN)}, and than the columns of "
        f"nerve.load_metrics; got {', '.join(taken)}. Give another name, or put it into a group: "
        f"labels={{'group': {{'{taken[0] if taken else ''}': …}}}}.",
    )


def _as_recorded(how: How) -> dict[str, Any]:
    """What was asked, as the configuration of the run has it."""
    chosen = {name: getattr(how, name) for name in _ASKED} | {"mask": how.mask is not None}
    lists = (("groups", how.grouped.groupings), ("sites", how.sites))
    return chosen | {name: list(each) for name, each in lists if each}


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
    """Measures one model, and stores it where there is a run. Arguments are those of `measure`."""
    loaded = model if isinstance(model, nn.Module) else model()
    require_model(loaded)
    loss, digest = WeightedMean(), Digest()

    def give(batch: Any, output: object) -> None:
        if run is not None:
            digest.add(tree_leaves(batch))
        found = loss_of(output)
        if found is not None:
            loss.add(*found)

    spectra, groups = spectra_of(
        loaded, batches, how, ffns=ffns, memory=memory, progress=progress, give=give
    )
    if run is not None:
        run.add(step, loaded, digest, spectra, loss.value(), tokens_seen, groups)
    return spectra


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda what, done, total: progress(prefix + what, done, total)
