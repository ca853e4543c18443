"""What forward passes change besides the features, and what is put back after those of a
measurement: random states, buffers, and tensors and numbers among the attributes of modules."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_BUDGET = 2**28
"""Bytes of buffers that are copied, the smallest first: a state that a model keeps is small, unlike
weights that are quantized, or a cache."""

_ABSENT = object()


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Puts the global random states of this process back where the block has advanced them, as a
    model does that draws its own noise or masks also in eval mode."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    has_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    gpus = torch.cuda.get_rng_state_all() if has_gpu else []
    try:
        yield
    finally:
        # Untouched ones are left alone: another thread may be using them.
        if random.getstate() != python:
            random.setstate(python)
        if not _are_equal(np.random.get_state(), numpy):
            np.random.set_state(numpy)
        if not torch.equal(torch.get_rng_state(), cpu):
            torch.set_rng_state(cpu)
        for device, state in enumerate(gpus):
            if not torch.equal(torch.cuda.get_rng_state(device), state):
                torch.cuda.set_rng_state(state, device)


def _are_equal(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def states_kept(model: nn.Module) -> Iterator[None]:
    """Puts back what the block changes in a model besides its parameters: buffers, changed in place
    or replaced, and tensors and numbers among the attributes of its modules (counters, memories).
    """
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(_restore_attributes, module, _attributes(module))
            stack.callback(_restore_buffers, module, dict(module._buffers))
        for buffer, copy in _copies(model):
            stack.callback(_restore_values, buffer, buffer._version, copy)
        yield


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor | int | float) and not isinstance(value, bool)


def _restore_attributes(module: nn.Module, known: dict[str, Any]) -> None:
    for name, value in _attributes(module).items():
        before = known.get(name, _ABSENT)
        if before is value or not _is_state(value):
            continue
        if before is _ABSENT:
            del vars(module)[name]
        elif before is None or _is_state(before):
            vars(module)[name] = before


def _restore_buffers(module: nn.Module, known: dict[str, Tensor | None]) -> None:
    for name, buffer in known.items():
        if module._buffers.get(name) is not buffer:
            module._buffers[name] = buffer


def _copies(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """The buffers whose values can be put back, each with a copy of it."""
    # Changes of one made in inference mode are not counted.
    buffers = [each for each in model.buffers() if not (each.is_inference() or each.is_meta)]
    total = 0
    for buffer in sorted(buffers, key=lambda each: each.nbytes):
        total += buffer.nbytes
        if total > _BUDGET:
            return
        yield buffer, buffer.detach().clone()


def _restore_values(buffer: Tensor, version: int, copy: Tensor) -> None:
    if buffer._version != version:
        with torch.no_grad():
            buffer.copy_(copy)
