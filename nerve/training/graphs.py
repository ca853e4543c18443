"""Compiled losses, whose kernels are launched as CUDA graphs where that is faster and correct.

A CUDA graph replays the kernels of a forward or backward pass with one launch. Small models are
limited by launches if the host is slow or shared: on an H200, a step of 16,384 tokens of a 12-layer
GPT with d_model 512 takes 13.5 ms with graphs, and without them 15.4 ms on idle cores and 23 to 28
on busy ones.

A replay overwrites the results of the previous one (CUDAGraph Trees of torch.compile's mode
`reduce-overhead`), so whatever outlives a step must be copied. Losses are copied here. Gradients
are consumed within their step, and `own_gradients` copies them if the next micro-batch adds to
them. A replay runs no Python, so batches whose features are tapped are not replayed.
"""

import logging
import sys
from collections.abc import Callable, Iterable

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.modules import module as modules

from nerve.measuring.tap import is_taking

Batch = tuple[Tensor, Tensor]
Losses = Callable[[Batch], tuple[Tensor, Tensor | None]]

PAYS_BELOW_FLOP = 2e11
"""Floating-point operations per matrix in a micro-batch, forward and backward. Launching the
kernels of one matrix takes the host half a millisecond (23.4 ms for the 49 of a 12-layer GPT), in
which an H200 does 2e11 operations. If there are more, the launches overlap with them, and graphs
would only hold memory that other code cannot use."""

log = logging.getLogger(__name__)


class CompiledLosses:
    """The losses of a batch, computed by compiled code: with CUDA graphs once `replay` is called,
    unless features are tapped.

    Args:
        losses: returns the loss of a batch and a second number that has no gradient.
    """

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self._plain: Losses = torch.compile(losses)
        self._graphed: Losses | None = None
        self._n_replayed, self._n_skipped = 0, 0
        self.is_replaying = False
        """Whether the last batch was replayed, so that the next one overwrites the gradients of its
        backward pass."""

    def replay(self, yes: bool) -> None:
        """Sets whether the batches that follow replay graphs."""
        compiled = torch.compile(self._losses, mode="reduce-overhead") if yes else None
        self._graphed, self.is_replaying = compiled, False
        self._n_replayed, self._n_skipped = 0, n_skipped()

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        self.is_replaying = self._graphed is not None and not is_taking()
        if not self.is_replaying:
            return self._plain(batch)
        assert self._graphed is not None
        if self._n_replayed == 1 and n_skipped() > self._n_skipped:
            log.warning(
                "torch launches %d of the compiled passes without CUDA graphs; set "
                "TORCH_LOGS=perf_hints to see why",
                n_skipped() - self._n_skipped,
            )
        self._n_replayed += 1
        torch.compiler.cudagraph_mark_step_begin()
        loss, other = self._graphed(batch)
        return loss.clone(), None if other is None else other.clone()


def n_skipped() -> int:
    """How many compiled passes of this process torch could not turn into graphs."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return 0 if compiler is None else int(compiler.counters["inductor"]["cudagraph_skips"])


def own_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces gradients that a replay wrote by copies, to which later ones can be added."""
    given = [each for each in parameters if each.grad is not None]
    gradients = [each.grad for each in given if each.grad is not None]
    copies = [torch.empty_like(gradient) for gradient in gradients]
    if copies:
        torch._foreach_copy_(copies, gradients)
    for parameter, copy in zip(given, copies, strict=True):
        parameter.grad = copy


def choose(trainer: L.Trainer, model: nn.Module, n_positions: int) -> bool:
    """Whether a fit replays graphs; logs the decision and its reason in one line.

    Args:
        n_positions: number of vectors that each matrix multiplies in a micro-batch.
    """
    why = reason_against(trainer, model)
    flop = flop_of_a_matrix(model, n_positions)
    if why is None and flop >= PAYS_BELOW_FLOP:
        why = f"{flop:.1e} operations per matrix and micro-batch take longer than their launches"
    if why is None:
        log.info("compiled, with CUDA graphs: only %.1e operations per matrix", flop)
    else:
        log.info("compiled, without CUDA graphs: %s", why)
    return why is None


def reason_against(trainer: L.Trainer, model: nn.Module) -> str | None:
    """Why graphs cannot be used; None if they can."""
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return f"training is on the {device.type}"
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        return "several processes exchange gradients in the backward pass"
    forward = modules._global_forward_hooks, modules._global_forward_pre_hooks
    backward = modules._global_backward_hooks, modules._global_backward_pre_hooks
    if any(forward) or any(backward):
        return "a hook on all modules would not run in a replay"
    for name, module in model.named_modules():
        hooks = [module._forward_hooks, module._forward_pre_hooks]
        hooks += [module._backward_hooks, module._backward_pre_hooks]
        for hook in (hook for each in hooks for hook in each.values()):
            if not str(getattr(hook, "__module__", "")).startswith("nerve."):
                what = getattr(hook, "__qualname__", type(hook).__name__)
                return f"the hook {what} on {name or 'the model'} would not run in a replay"
    return None


def flop_of_a_matrix(model: nn.Module, n_positions: int) -> float:
    """Floating-point operations per linear layer in one forward and backward pass, averaged over
    the linear layers: 6 · d_in · d_out · positions; 0 if the model has none."""
    sizes = [
        each.in_features * each.out_features
        for each in model.modules()
        if isinstance(each, nn.Linear)
    ]
    return 6.0 * n_positions * sum(sizes) / max(1, len(sizes))
