"""Digests of tensors: what tells weights and batches apart, wherever they lie."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def add_tensors(digest: Any, tensors: Iterable[Any]) -> None:
    """Adds types, shapes and values of those of `tensors` that are tensors to a digest."""
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(plain.numpy())


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits over the state of a model."""
    digest = hashlib.sha256()
    add_tensors(digest, model.state_dict().values())
    return digest.hexdigest()[:16]
