"""What features must be, and what post must be to pre: refused where they are not."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nerve.errors import MeasurementError
from nerve.measuring.graph import is_factor, way_from
from nerve.measuring.sites import Site


def plain(features: Any, side: str, where: str) -> Tensor:
    """The tensor, detached.

    Args:
        features: what a module gives or gets.
        side, where: of an FFN, for messages.

    Raises:
        MeasurementError: unless it is one plain tensor of floats.
    """
    if isinstance(features, DTensor):
        raise split(where)
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise MeasurementError(
            f"Features must be one tensor of floats; {side} of {where} is "
            f"{type(features).__name__}. Give the modules whose output (pre) and first argument "
            "(post) are the features."
        )
    if torch.compiler.is_compiling():
        return features.detach()
    if features.is_nested or features.layout != torch.strided or features.is_quantized:
        kind = "nested" if features.is_nested else str(features.layout)
        raise MeasurementError(
            f"Features must be one plain, strided tensor; {side} of {where} is "
            f"{'quantized' if features.is_quantized else kind}. Of nn.TransformerEncoder: "
            "torch.backends.mha.set_fastpath_enabled(False) keeps it dense, and a mask leaves "
            "padding out."
        )
    if type(features).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise MeasurementError(
            f"Features must be one plain tensor; {side} of {where} is {type(features).__name__}, "
            "whose numbers only its own operators can read."
        )
    return features.as_subclass(Tensor).detach()


def of_site(tensor: Tensor, site: Site, where: str) -> Tensor:
    """The features `[*samples, width]` of a site.

    Raises:
        MeasurementError: where the axis that holds them is not as wide as the module declares.
    """
    axis, declared = site.feature_axis, site.declared
    if not -tensor.ndim <= axis < tensor.ndim or (
        declared is not None and tensor.shape[axis] != declared
    ):
        raise MeasurementError(
            f"The axis that holds the features of {where} must be as wide as "
            f"{type(site.module).__name__} declares, {declared}; axis {axis} of "
            f"{tuple(tensor.shape)} is not."
        )
    return site.features(tensor)


def check_same_samples(pre: Tensor, post: Tensor, where: str) -> None:
    """Raises `MeasurementError` unless both are as many samples of as many features."""
    if pre.numel() != post.numel() or pre.shape[-1] != post.shape[-1]:
        raise MeasurementError(
            "Features before and after a nonlinearity must be of the same samples and width; "
            f"{where} has {tuple(pre.shape)} before and {tuple(post.shape)} after. Check which "
            "modules its description names."
        )


def check_follows(pre: Tensor, post: Tensor, where: str) -> None:
    """Raises `MeasurementError` unless autograd has recorded how post follows from pre, without a
    matrix in between."""
    assert pre.grad_fn is not None
    way = way_from(pre.grad_fn, post)
    if way != "directly":
        raise MeasurementError(
            f"Post must follow from pre through the nonlinearity alone; of {where} it follows "
            f"{way}. Check which modules its description names: those of one FFN, the projection "
            "before its nonlinearity and the one after."
        )


def check_is_no_factor(pre: Tensor, post: Tensor, site: Site, where: str) -> None:
    """Raises `MeasurementError` where pre is the side of a gated FFN that multiplies.

    Args:
        pre: what the module of `site` gives or gets, recorded by autograd.
        post: what follows from it.
        site: of pre.
        where: for messages.
    """
    # Of a fused projection another part is a factor; rounding to 16 bits would look like one.
    is_whole = site.part == slice(None) and pre.numel() == post.numel() > 0
    if is_whole and pre.dtype.itemsize > 2 and is_factor(pre, post, site.feature_axis):
        raise MeasurementError(
            f"Pre must be what the nonlinearity gets; of {where} it is what the nonlinearity's "
            "output is multiplied with. Name the gate."
        )


def split(where: str) -> MeasurementError:
    """The error for features that are slices."""
    return MeasurementError(
        "Features must be whole, since the spectra of slices do not add up; those of "
        f"{where} are split over processes by tensor parallelism. Train with data parallelism or "
        "FSDP."
    )
