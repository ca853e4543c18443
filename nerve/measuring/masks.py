"""Which samples count: masks, and the streams of tokens that they belong to."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFN, named

Masks = Tensor | None | Mapping[str, Tensor | None] | Sequence[Tensor | None]
"""One mask for all FFNs, or one for each: by the FFN's name, or in the order of the FFNs. None
counts all samples."""


class Order(NamedTuple):
    """How the tokens of a stream are arranged in an FFN's features.

    Attributes:
        n_sequences, n_positions: the sizes of the stream, as in its mask.
        batch_first: whether the features are ordered sequence by sequence.
    """

    n_sequences: int
    n_positions: int
    batch_first: bool

    def fits(self, features: Tensor) -> bool:
        """Whether they are as many as the tokens."""
        return features[..., 0].numel() == self.n_sequences * self.n_positions

    def sequences(self, features: Tensor, where: str) -> Tensor:
        """`[n_sequences, n_positions, width]` of features in this order, flattened or not.

        Raises:
            MeasurementError: if the number of samples differs.
        """
        sizes = (self.n_sequences, self.n_positions)
        if not self.fits(features):
            raise MeasurementError(
                f"{where} received the tokens of one stream in the first batch; now its features "
                f"have the shape {tuple(features.shape)} for {sizes[0]} sequences of {sizes[1]}. "
                "If the model drops padding itself, mask=lambda batch: None counts all samples."
            )
        if self.batch_first:
            return features.reshape(*sizes, features.shape[-1])
        return features.reshape(*sizes[::-1], features.shape[-1]).transpose(0, 1)


class UnknownOrder:
    """The order of an FFN's tokens if it could not be determined; the FFN must then not receive
    any."""

    def fits(self, features: Tensor) -> bool:
        """True: `sequences` says what is wrong with them."""
        return True

    def sequences(self, features: Tensor, where: str) -> Tensor:
        """Raises `MeasurementError`: features have come."""
        raise MeasurementError(
            f"{where} did not run on the two short sequences that show which tokens each FFN "
            "receives and in which order, but it runs now, with a mask or skip_first=. Give "
            "batches that are not mappings, with forward=, and one mask for each FFN with mask=."
        )


Orders = Sequence[Order | UnknownOrder | None]
"""For each FFN the order of its tokens; None if they are used as they are."""


def as_bool(mask: Tensor) -> Tensor:
    """A mask as bool: True for the samples that count.

    Raises:
        MeasurementError: for values other than 0 and 1.
    """
    if mask.dtype == torch.bool:
        return mask
    ones = mask == 1
    if not bool((ones | (mask == 0)).all()):
        raise MeasurementError(
            "A mask must be 1 (or True) for the samples that count and 0 for padding; got values "
            f"from {mask.min().item():g} to {mask.max().item():g}. Of an additive mask (0 and "
            "-inf): mask=lambda batch: batch[...] == 0."
        )
    return ones


def without_first(mask: Tensor, skip_first: int, unpadded: Tensor | None = None) -> Tensor:
    """The mask without the first positions after the left padding of each sequence; those of a
    sequence without such padding are left to the caller.

    Args:
        mask: `[..., n_positions]`, of bool.
        skip_first: number of positions.
        unpadded: True for the samples that are no padding, in the shape of the mask; None if those
            at the beginning of a sequence that do not count are.
    """
    if not skip_first or mask.ndim < 2 or not mask.shape[-1]:
        return mask
    known = mask if unpadded is None else unpadded.to(mask.device)
    start = known.int().argmax(-1, keepdim=True)
    position = torch.arange(mask.shape[-1], device=mask.device)
    return mask & ((start == 0) | (position >= start + skip_first))


class Chosen(NamedTuple):
    """Which samples of a forward pass count, and what is known about them; by default all count.

    Attributes:
        masks: True or 1 for the samples that count (False or 0: padding), in the shape of the
            features without their last dimension, or flattened as they are; one for all FFNs or
            one for each.
        orders: for each FFN, the order of its stream's tokens in its features, if known; its mask
            is then `[n_sequences, n_positions]`.
        ids: the tokens of the samples, `[n_sequences, n_positions]`, for all FFNs or for each;
            groups by frequency need them.
        in_sequences: for each FFN, whether its samples form sequences; otherwise they are not
            grouped. None if all do.
        unpadded: for each FFN, which samples are neither padding nor skipped behind it, in the
            shape of its mask; None if all that do not count are padding.
    """

    masks: Masks = None
    orders: Orders | None = None
    ids: Tensor | Sequence[Tensor | None] | None = None
    in_sequences: Sequence[bool] | None = None
    unpadded: Sequence[Tensor | None] | None = None


ALL = Chosen()


def for_each(ffns: Sequence[FFN], masks: Masks) -> list[Tensor | None]:
    """The mask of each FFN.

    Raises:
        MeasurementError: if an FFN has no mask, or a mask has no FFN or values other than 0 and 1.
    """
    if masks is None or isinstance(masks, Tensor):
        each: list[Tensor | None] = [masks] * len(ffns)
    elif isinstance(masks, Mapping):
        names = {ffn.name for ffn in ffns}
        if set(masks) != names:
            raise MeasurementError(
                "A mapping of masks needs one entry for each FFN name (None counts all samples): "
                f"{', '.join(sorted(names))}; got {', '.join(sorted(map(str, masks))) or 'none'}."
            )
        each = [masks[ffn.name] for ffn in ffns]
    else:
        each = list(masks)
        if len(each) != len(ffns):
            raise MeasurementError(
                "A list of masks needs one entry for each FFN (None counts all samples), "
                f"{len(ffns)}; got {len(each)}."
            )
    known: dict[int, Tensor] = {}
    for mask in each:
        if mask is not None and id(mask) not in known:
            known[id(mask)] = as_bool(mask)
    return [None if mask is None else known[id(mask)] for mask in each]


def fitted(mask: Tensor, samples: torch.Size, ffn: FFN) -> Tensor:
    """The mask in the shape of an FFN's samples: unchanged, or flattened like them.

    Raises:
        MeasurementError: if it belongs to other samples.
    """
    if mask.shape == samples:
        return mask
    if mask.numel() == samples.numel() and _is_flattened(list(mask.shape), list(samples)):
        return mask.reshape(samples)
    raise MeasurementError(
        f"A mask must have one value per sample; {named(ffn)} has samples {tuple(samples)}, the "
        f"mask is {tuple(mask.shape)}. If it belongs to another stream of tokens, give one mask "
        f"per stream: mask=lambda batch: {{name of the FFNs: its mask, or None}}."
    )


def _is_flattened(sizes: list[int], flat: list[int]) -> bool:
    """Whether multiplying neighbors among `sizes` gives `flat`."""
    for size in flat:
        product = sizes.pop(0) if sizes else 0
        while product < size and sizes:
            product *= sizes.pop(0)
        if product != size:
            return False
    return all(size == 1 for size in sizes)
