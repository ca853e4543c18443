"""Digests of tensors, by which a run recognizes what it was measured on."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nerve.measuring.masks import Masks, as_bool


class Digest:
    """A digest of tensors: their types, shapes and values."""

    def __init__(self) -> None:
        self._sha: Any = hashlib.sha256()

    def add(self, tensors: Iterable[Any]) -> None:
        """Adds tensors; other values are ignored."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._sha.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
                plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                self._sha.update(plain.numpy())

    def add_batch(self, batch: Any) -> None:
        """Adds the tensors of a batch, at any depth, also in mappings that are no node of torch's
        trees, such as what a tokenizer of transformers returns."""
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Mapping):
                self.add_batch(dict(leaf))
            else:
                self.add([leaf])

    def add_masks(self, masks: Masks) -> None:
        """Adds the masks of a batch, each with the FFN that it is for."""
        if masks is None or isinstance(masks, Tensor):
            masks = {"": masks}
        elif not isinstance(masks, Mapping):
            masks = {str(index): mask for index, mask in enumerate(masks)}
        for name in sorted(masks):
            mask = masks[name]
            self._sha.update(f"{name}: {mask is not None} ".encode())
            self.add([] if mask is None else [as_bool(mask)])

    def __str__(self) -> str:
        return self._sha.hexdigest()[:16]


class SampleDigests:
    """Digests of the batches that a model is measured on, and of the masks that a caller gives.

    Args:
        mask: the caller's function, which is called in any case; None without one.
    """

    def __init__(self, mask: Callable[[Any], Masks] | None) -> None:
        self._batches, self._masks = Digest(), None if mask is None else Digest()
        self._given: list[Masks] = []
        self.mask = None if mask is None else self._noting(mask)
        """The caller's function; the digest has what it returns when it is first called between two
        batches, which is for the whole batch."""

    def add(self, batch: Any) -> None:
        """Adds a batch for which `mask` has been called."""
        self._batches.add_batch(batch)
        if self._masks is not None:
            self._masks.add_masks(self._given[0])
            self._given.clear()

    def as_config(self) -> dict[str, str]:
        """The digests as the configuration of the run records them."""
        masks = {} if self._masks is None else {"masks": str(self._masks)}
        return {"batches": str(self._batches), **masks}

    def _noting(self, mask: Callable[[Any], Masks]) -> Callable[[Any], Masks]:
        def noting(batch: Any) -> Masks:
            masks = mask(batch)
            if not self._given:
                self._given.append(masks)
            return masks

        return noting
