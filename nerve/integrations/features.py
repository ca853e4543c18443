"""Reads the features of forward passes that an external training loop runs."""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from nerve.errors import MeasurementError
from nerve.integrations.wrapping import is_compiled
from nerve.measuring.arguments import batch_of
from nerve.measuring.choice import Choice
from nerve.measuring.ffns import sites_of
from nerve.measuring.hidden_padding import hidden_padding_refused
from nerve.measuring.tap import Hook, is_looking
from nerve.recording.recorder import Recorder


class PassFeatures:
    """Reads the features of a model's forward passes while it is open.

    A pass ends when the model returns. Activation checkpointing reruns parts of it in the backward
    pass, which do not count; nor do passes that inspect the model, here or in `nerve.measure`. In
    compiled code, the hooks run in Python.

    Args:
        model: the module that is called.
        recorder: an open recorder, which receives the features.
        choice: which samples of a batch count.
        of_training: whether to measure passes in train mode with gradients, one per micro-batch;
            otherwise passes in eval mode without gradients.
    """

    def __init__(
        self, model: nn.Module, recorder: Recorder, choice: Choice, *, of_training: bool
    ) -> None:
        self.is_open = False
        self.is_of_loop: Callable[[], bool] = lambda: True
        """Whether a pass is the loop's own, if that can be determined."""
        self.n_sequences = 0
        """Number of rows in the batches since the last call of `require_seen`."""
        self._recorder = recorder
        self._choice = choice
        self._of_training = of_training
        self.n_seen = 0
        """Number of passes measured since then."""
        self._is_taking = False
        self._weights = WeakIdKeyDictionary()
        self._refusing = ExitStack()
        self._model = weakref.ref(model)
        self._handles = [
            model.register_forward_pre_hook(untraced(self._start), with_kwargs=True),
            model.register_forward_hook(untraced(self._stop)),
        ]

    def require_seen(self, step: int) -> None:
        """Ends the passes of a step.

        Raises:
            MeasurementError: if there was no pass, or one did not complete.
        """
        self.is_open = False
        self._require_ended()
        if self.n_seen == 0:
            kind = (
                "those of the next training pass, but there was none: the watched module must be "
                "the one that the loop calls, in train mode and with gradients. Watch the compiled "
                "or distributed module if the loop calls that, or give held-out batches with "
                "heldout=."
                if self._of_training
                else "those of its evaluation, but there was none. Give the Trainer an "
                "eval_dataset that is not empty, whose batches its prediction_step gives to the "
                "model that it trains, or take source='train'."
            )
            raise MeasurementError(f"The features of step {step} are {kind}")
        self.n_seen = self.n_sequences = 0

    def close(self) -> None:
        """Removes the hooks from the model."""
        self._refusing.close()
        for handle in self._handles:
            handle.remove()

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_meant = (module.training and torch.is_grad_enabled()) == self._of_training
        is_meant = is_meant and module.training == self._of_training
        if self.is_open and is_meant and self._is_own(module) and self.is_of_loop():
            batch = batch_of(module, args, kwargs, by_name=not self._choice.has_mask)
            first = next((x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), None)
            self.n_sequences += 0 if first is None else len(first)
            self._require_ended()
            self._require_same_weights()
            with self._recorder.clock:
                chosen = self._choice.of(batch)  # which may run the model itself
            self._refusing.close()
            if not (self._choice.shows_padding or is_compiled(module)):
                self._refusing.enter_context(hidden_padding_refused(module))
            self._is_taking = True
            self._recorder.start(chosen)

    def _is_own(self, module: nn.Module) -> bool:
        """Whether this is a pass of the model itself: not of a replica, which shares its hooks, and
        not one that inspects, exports or traces the model, or repeats an earlier one."""
        is_exported = torch.compiler.is_exporting() or torch.jit.is_tracing()
        is_apart = is_looking() or is_exported or _is_recomputed()
        return module is self._model() and not is_apart

    def _require_ended(self) -> None:
        """Raises `MeasurementError` if a pass has raised, since some of its features are already
        counted."""
        if self._is_taking:
            raise MeasurementError(
                "A measured forward pass must complete; the last one raised an exception, and the "
                "loop continued. Measure at steps that are not retried, or give held-out batches "
                "with heldout=."
            )

    def _require_same_weights(self) -> None:
        """Raises `MeasurementError` if weights have changed since the last pass of this step."""
        known = self._weights if self.n_seen else {}
        if any(version != known.get(each, version) for each, version in self._versions()):
            raise MeasurementError(
                "The features of a step are those of one set of weights; weights have changed "
                f"between two passes of step {self._recorder.due_step}. Call step after each step "
                "of the optimizer; if this runs the model several times (LBFGS), give held-out "
                "batches with heldout=."
            )

    def _versions(self) -> Iterator[tuple[Tensor, int]]:
        """The weights of the projections before the nonlinearities, each with a number that changes
        with its values. A weight replaced by another tensor (FSDP's all-gather, `functional_call`)
        is not treated as changed."""
        modules = (sites_of(ffn)[0].module for ffn in self._recorder.probe.ffns)
        weights = (each for module in modules for each in module.parameters())
        return ((each, each._version) for each in weights if not each.is_inference())

    def _stop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._is_taking and self._is_own(module):
            self._is_taking = False
            self._refusing.close()
            self._recorder.stop()
            self.n_seen += 1
            self._weights = WeakIdKeyDictionary(dict(self._versions()))


def _is_recomputed() -> bool:
    """Whether the pass belongs to a backward pass in which activation checkpointing repeats one
    that has run with gradients. (The reentrant kind ran without; its repetition is the pass.)"""
    if torch._C._current_graph_task_id() == -1:
        return False
    frame, place = sys._getframe(1), torch.utils.checkpoint.__file__
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "recompute_fn" and frame.f_code.co_filename == place:
            return True
    return False


def untraced(look: Callable[..., None]) -> Hook:
    """A hook that compiled code leaves to Python. If nothing is compiled, the compiler is not
    imported for it, which takes seconds and, with a process group, keeps its threads alive."""
    return _untraced_hook()(look) if "torch._dynamo" in sys.modules else Hook(look)


@cache
def _untraced_hook() -> type[Hook]:
    """A hook whose call itself is left to Python: inside a traced hook the graph would break."""
    return type("UntracedHook", (Hook,), {"__call__": torch.compiler.disable(Hook.__call__)})
