"""The inexact shortcut: computing pre from the FFN's input, without its rounding to 16 bits."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFN, named, sites_of
from nerve.measuring.groups import REST, Division
from nerve.spectra.moments import Spread

PROJECTED = "projected"
"""The setting that requests it, in place of true."""


def is_rounded(pre: Tensor) -> bool:
    """Whether pre was rounded to a 16-bit type for which the size of the rounding is known."""
    return pre.dtype in (torch.bfloat16, torch.float16)


def require_affine(ffn: FFN, inputs: Tensor, pre: Tensor) -> None:
    """Raises if no weight defines pre; not if pre is as narrow as the input, so that measuring it
    costs no more."""
    if sites_of(ffn)[0].of != "output" or pre.shape[-1] > inputs.shape[-1]:
        raise not_affine(ffn)


def not_affine(ffn: FFN) -> MeasurementError:
    """The error for an FFN whose pre cannot be projected."""
    return MeasurementError(
        f"shortcut={PROJECTED} computes pre from the FFN's input, so pre must be W x + b with a "
        f"single readable weight; that of {named(ffn)} is not. Either it is described as the input "
        "of an activation, or its projection is not a linear layer, is modified (by an adapter, a "
        "hook, a different weight in each run), sharded, or parametrized and in training. Set "
        "shortcut to true, which measures pre itself."
    )


def is_rounding_small(
    pre: Tensor, spread: Spread | None, divisions: Mapping[str, Division] | None
) -> bool:
    """Whether rounding contributes a negligible part of the variance of pre, and of that of each
    group.

    Args:
        pre: the features of a run, `[*samples, d_ff]`.
        spread: the spread of the samples that count; None if there are none.
        divisions: how these are grouped, by grouping.
    """
    if spread is None:
        return True
    rows = pre.reshape(-1, pre.shape[-1])
    spreads = [spread] + [
        Spread.of(rows.index_select(0, chosen))
        for division in (divisions or {}).values()
        for group, chosen in (division.parts | division.others).items()
        if group != REST and len(chosen) > 1
    ]
    return all(each.rounding_is_negligible(pre.dtype) for each in spreads)
