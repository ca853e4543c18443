"""`nerve.measure`: a model and batches to one row an FFN, and to a run that stays."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pandas as pd
from torch import Tensor, nn

from nerve.config import require, require_count, require_several
from nerve.measuring.ffns import FFN
from nerve.measuring.groups import Grouped
from nerve.measuring.masks import Masks
from nerve.measuring.measure import frame_of, spectra_of
from nerve.measuring.streams import count_tokens
from nerve.metric_names import AROUND, GROUPS
from nerve.recording.cadence import WeightedMean
from nerve.recording.losses import loss_of
from nerve.recording.measured_run import OWN, measured_run


def measure(
    model: nn.Module | Iterable[tuple[int, nn.Module]],
    batches: Iterable[Any],
    *,
    into: str | os.PathLike[str] | None = None,
    step: int = 0,
    labels: Mapping[str, Any] | None = None,
    spectra: bool | str = True,
    ffns: Sequence[FFN] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    mask: Callable[[Any], Masks] | None = None,
    exclude: Collection[int] = (),
    only_labeled: bool = False,
    skip_first: int = 0,
    shortcut: bool = True,
    groups: Sequence[str] = (),
    sites: Sequence[str] = (),
    token_counts: Tensor | None = None,
) -> pd.DataFrame:
    """Measures the FFNs of any torch model over batches; neither Lightning nor Hydra is needed.

    The model runs in eval mode without gradients, uncompiled, and is left as it was: weights,
    modes, hooks, compiled code and random states.

    Args:
        model: the model, on the device of the batches; or a series of (step, model), such as
            checkpoints as they are loaded, which are measured one after the other.
        batches: what `forward` takes; all of them make one measurement.
        into: a run directory, which must be new: what is measured is stored there as a run stores
            it, with the validation loss where the model returns a `loss` (weighted by `n_targets`
            where that is there, too). Its configuration has `model`, the model's own or its class;
            `weights` and `batches`, digests; and `measure`, what was asked.
            `tokens_seen` is 0, as nothing says it.
        step: of a single model, the step that it is of.
        labels: what else tells the run apart, by name; they are columns of `nerve.load_runs`.
        spectra: whether eigenvalues are stored, too; `auto` for d_ff up to 1024.
        ffns: descriptions of the FFNs; None for what `nerve.find_ffns` finds with the first batch.
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
            as exact and cheaper; False always takes the features themselves.
        groups: groupings of the samples, of `position`, `frequency` and `halves`, whose groups are
            measured by themselves as well and stored in `into`, where `nerve.load_groups` reads
            them.
        sites: of `stream_in`, `input`, `output` and `stream_out` those that are measured as well,
            likewise; where a model does not say where its residual stream is, one forward pass of
            the first batch shows it, or a warning says that it does not.
        token_counts: how often each token id occurs in the text that the model learned from, for
            groups by frequency; None counts the batches.

    Returns:
        One row per FFN: layer, ffn, n_samples, d_ff, d_in; spectral entropy (se, nats),
        participation ratio (pr), eigenvalue early enrichment (eee), total variance and corrected
        pr, shares of the farthest sample, of the farthest 0.1% and of the mean, each _pre and
        _post; Jensen-Shannon divergence (js, nats); variance_outside; precision and status. NaN
        where nothing can be measured, status says why. `outliers` names the sites whose spectrum
        may be that of a few samples. Of a series the first column is the step.

    Raises:
        ConfigError: for one batch in place of a list, or labels with a name that is taken.
        StoreError: for a directory that has another run, or one that is done.
        MeasurementError: for a model without FFNs, no batches, or features, masks or descriptions
            that are not what they are said to be.
    """

    require(
        not isinstance(batches, Tensor | Mapping),
        f"batches is a list of batches; got one, a {type(batches).__name__}. Give [batch].",
    )
    require_count("step", step, least=0)
    require(spectra in (True, False, "auto"), f"spectra is true, false or 'auto'; got {spectra!r}.")
    labels = dict(labels or {})
    taken = sorted(labels.keys() & {*OWN})
    require(not taken, f"labels are named otherwise than {', '.join(OWN)}; got {', '.join(taken)}.")
    how: dict[str, Any] = {
        "exclude": tuple(exclude),
        "only_labeled": only_labeled,
        "skip_first": skip_first,
        "shortcut": shortcut,
    }
    for name, chosen, options in (("groups", groups, GROUPS), ("sites", sites, AROUND)):
        require_several(name, chosen, options)
    require(
        into is not None or not (groups or sites),
        "Groups and sites are stored in a run, for nerve.load_groups; got none. Give into=.",
    )
    is_series = not isinstance(model, nn.Module)
    series = [(step, model)] if isinstance(model, nn.Module) else model
    counts_here = "frequency" in groups and token_counts is None
    batches, frames = list(batches) if is_series or counts_here else batches, []
    grouped = Grouped(tuple(groups), count_tokens(batches) if counts_here else token_counts)
    asked = {**labels, "measure": {**how, "mask": mask is not None}}
    if groups or sites:
        asked["measure"] |= {"groups": list(groups), "sites": list(sites)}
    with nullcontext() if into is None else measured_run(into, asked, spectra) as run:
        for at, each in series:
            loss = WeightedMean()

            def add_loss(output: object, loss: WeightedMean = loss) -> None:
                found = loss_of(output)
                if found is not None:
                    loss.add(*found)

            found, of_groups = spectra_of(
                each,
                batches if run is None else run.noting(batches),
                ffns=ffns,
                forward=forward,
                mask=mask,
                **how,
                grouped=grouped,
                sites=sites,
                give=add_loss,
            )
            if run is not None:
                run.add(at, each, found, of_groups, loss.value())
            frames.append(frame_of(found))
            if is_series:
                frames[-1].insert(0, "step", at)
    return pd.concat(frames, ignore_index=True)
