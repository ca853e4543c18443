"""Collectives of tensors, which the processes of a run must all call."""

import torch
import torch.distributed as dist
from torch import Tensor


def highest(value: int, device: torch.device) -> int:
    """The maximum of every process's `value`; all of them must call it.

    Args:
        value: the value of this process.
        device: the device on which the processes exchange tensors.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def add_up(tensor: Tensor) -> None:
    """Replaces every process's `tensor` by the sum over all; all of them must call it."""
    dist.all_reduce(tensor)


def shared_from(owner: int, tensor: Tensor) -> None:
    """Copies `owner`'s `tensor` into that of every process; all of them must call it."""
    # torch sends memory in its layout, and the strides may differ between processes.
    sent = tensor.contiguous()
    dist.broadcast(sent, src=owner)
    tensor.copy_(sent)
