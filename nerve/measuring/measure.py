"""`nerve.measure`: a model and batches to one row an FFN."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import pandas as pd
from torch import nn

from nerve.measuring.choice import Choice, call_probed
from nerve.measuring.ffns import FFN
from nerve.measuring.find import find_ffns
from nerve.measuring.forward import call, evaluating
from nerve.measuring.masks import Masks
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.outliers import outliers

log = logging.getLogger(__name__)


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    ffns: Sequence[FFN] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    mask: Callable[[Any], Masks] | None = None,
    exclude: Collection[int] = (),
    only_labeled: bool = False,
    skip_first: int = 0,
    shortcut: bool = True,
) -> pd.DataFrame:
    """Measures the FFNs of any torch model over batches; neither Lightning nor Hydra is needed.

    The model runs in eval mode without gradients, uncompiled, and is left as it was: weights,
    modes, hooks, compiled code and random states.

    Args:
        model: the model, on the device of the batches.
        batches: what `forward` takes; all of them make one measurement.
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

    Returns:
        One row per FFN: layer, ffn, n_samples, d_ff, d_in; spectral entropy (se, nats),
        participation ratio (pr), eigenvalue early enrichment (eee), total variance and corrected
        pr, shares of the farthest sample, of the farthest 0.1% and of the mean, each _pre and
        _post; Jensen-Shannon divergence (js, nats); variance_outside; precision and status. NaN
        where nothing can be measured, status says why. `outliers` names the sites whose spectrum
        may be that of a few samples.

    Raises:
        MeasurementError: for a model without FFNs, no batches, or features, masks or descriptions
            that are not what they are said to be.
    """

    def run(batch: Any) -> object:
        return call_probed(probe, forward or call, model, batch)

    with evaluating(model):
        batches = iter(batches)
        if ffns is None:
            first = list(_first(batches))
            found = find_ffns(model, first[0] if first else None, forward=forward)
            log.info("FFNs to measure:\n%s", found)
            for line in found.unclear:
                log.warning("not measured; by hand, if it is an FFN: %s", line)
            ffns = found
            batches = chain(first, batches)
        probe = Probe(ffns)
        measurement = Measurement(probe, shortcut=shortcut, skip_first=skip_first)
        choice = Choice(model, probe, run, mask, tuple(exclude), only_labeled, skip_first > 0)
        probe.install()
        try:
            for batch in batches:
                measurement.start(*choice.of(batch))
                run(batch)
                measurement.finish_forward()
        finally:
            probe.remove()
    rows = pd.DataFrame([spectra.row() for spectra in measurement.spectra()])
    rows = rows.astype({name: float for name in rows if rows[name].isna().all()})
    return rows.assign(outliers=outliers(rows))


def _first(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        yield batch
        return
