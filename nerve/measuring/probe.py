"""Taps the features of feed-forward networks (FFNs) while their model runs.

A probe knows sites and tensors, nothing of covariance or metrics: what it taps goes to the
`receive` function that it is given, as it appears, so that no activation is kept.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFN, n_runs_of, named, sites_of
from nerve.measuring.graph import is_factor, way_from
from nerve.measuring.sites import Site, declared_widths, last

SAMPLES = 8
"""How many samples of features are compared, at least, to see that a nonlinearity left them."""

Receive = Callable[[int, Tensor, Tensor, Tensor], None]
"""Takes an FFN's index and its features, detached: what the FFN gets `[*samples, d_in]` (pre itself
where pre is what a module gets), and what there is before and after its nonlinearity
`[*samples, d_ff]`."""


class _Before(NamedTuple):
    """What is known of an FFN until its nonlinearity is through.

    Attributes:
        inputs, pre: as `Receive` takes them.
        sample: of pre, as it was when it appeared.
        recorded: pre as the model goes on with it, where autograd records what follows.
    """

    inputs: Tensor
    pre: Tensor
    sample: Tensor
    recorded: Tensor | None


class Probe:
    """Taps the features of FFNs in every forward pass between `start()` and `stop()`.

    Its hooks must be in place when a model is compiled: `install()` before the first call of
    compiled code. That code then exists in two versions, with the taps and without them, and
    starting and stopping chooses; a probe that is stopped costs nothing.

    What the descriptions promise is checked at each run. That post follows from pre, with no matrix
    in between, is checked at the first run of each FFN: autograd records what happens between the
    two, and there alone. Compiled code and inference mode do not allow for that.

    Args:
        ffns: the FFNs to tap.

    Raises:
        MeasurementError: if there is none, if two share layer and name, or if pre is the output of
            a module without weights.
    """

    def __init__(self, ffns: Sequence[FFN]) -> None:
        if not ffns:
            raise MeasurementError("A measurement needs at least one FFN; got an empty list.")
        doubled = [key for key, n in Counter((f.layer, f.name) for f in ffns).items() if n > 1]
        if doubled:
            raise MeasurementError(
                "Layer and name must tell FFNs apart; (layer, name) = "
                f"{doubled[0]} stands for several."
            )
        self.ffns = ffns
        self.sites = [sites_of(ffn) for ffn in ffns]
        self._receive: Receive | None = None
        self._before: dict[int, _Before] = {}
        self._times: Counter[int] = Counter()
        self._followed: set[int] = set()
        self._recording: set[int] = set()
        self._handles: list[RemovableHandle] = []
        # Compiled code can name a probe by a number alone.
        self._number = next(_numbers)
        self._order = torch.zeros(())
        _probes[self._number] = self

    def install(self) -> None:
        """Puts the hooks in place."""
        for index, (pre, post) in enumerate(self.sites):
            self._handles += [
                pre.module.register_forward_hook(self._hook_output(index), with_kwargs=True)
                if pre.of == "output"
                else pre.module.register_forward_pre_hook(
                    self._hook_input(index), with_kwargs=True
                ),
                post.module.register_forward_pre_hook(self._hook_post(index), with_kwargs=True)
                if post.of == "input"
                else post.module.register_forward_hook(self._hook_given(index)),
            ]

    def remove(self) -> None:
        """Takes the hooks away; allowed at any time."""
        self.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self, receive: Receive) -> None:
        """From now on calls `receive` once for each run of an FFN."""
        self._receive = receive

    def stop(self) -> None:
        """Stops tapping; allowed at any time."""
        self._receive = None
        self._forget()

    def finish_forward(self) -> None:
        """Ends one forward pass: every FFN must have run as often as its description says.

        Raises:
            MeasurementError: for an FFN that did not, or whose post never came.
        """
        times, pending = Counter(self._times), set(self._before)
        self._forget()
        for index, ffn in enumerate(self.ffns):
            promised = n_runs_of(ffn)
            if index in pending:
                raise MeasurementError(
                    f"Post must follow pre; of {named(ffn)} it never came. Check which modules its "
                    "description names, and whether the forward pass ended early."
                )
            if promised is not None and times[index] != promised:
                raise MeasurementError(
                    f"{named(ffn)} is described as running n_runs={promised} times in a measured "
                    f"forward pass; it ran {times[index]} times. Where layers are shared, looped "
                    "or skipped, or a module runs twice by design, describe it with n_runs=None, "
                    "which pools what runs. Otherwise: the model must be called once a forward "
                    "pass, without activation checkpointing, and a compiled model through the "
                    "module that was compiled."
                )

    def take(self, index: int, inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor) -> None:
        """What the taps call with features, and a sample of pre as it was when it appeared;
        nothing happens while stopped.

        Raises:
            MeasurementError: for features that are not those of the FFN.
        """
        if self._receive is None:
            return
        module = self.sites[index][0].module
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise self._split(index)  # the features are a slice, which no type shows
        if pre.numel() != post.numel() or pre.shape[-1] != post.shape[-1]:
            raise MeasurementError(
                "Features before and after a nonlinearity must be of the same samples and width; "
                f"{self._named(index)} has {tuple(pre.shape)} before and {tuple(post.shape)} "
                "after. Check which modules its description names."
            )
        if not torch.allclose(sample_of(pre), sample, rtol=0, atol=0, equal_nan=True):
            raise MeasurementError(
                "A nonlinearity must leave its input as it is; that of "
                f"{self._named(index)} overwrites it. Use one with inplace=False."
            )
        self._times[index] += 1
        self._receive(index, inputs, pre, post)

    # Everything is tapped once post is there: a tap of pre alone, ahead of the nonlinearity, would
    # make compiled code keep more for the backward pass than it keeps without.

    def _hook_output(self, index: int) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            if self._receive is None:
                return None
            site = self.sites[index][0]
            given = self._checked(index, "input", argument(args, kwargs))
            widths = declared_widths(module)
            inputs = last(given, site.feature_axis if widths is None else widths.axis)
            output, changed = self._recorded(index, self._checked(index, "pre", output), output)
            self._keep(index, inputs, site, output)
            return output if changed else None

        return hook

    def _hook_input(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._receive is None:
                return None
            given = argument(args, kwargs)
            given, changed = self._recorded(index, self._checked(index, "pre", given), given)
            self._keep(index, None, self.sites[index][0], given)
            return replaced(args, kwargs, given) if changed else None

        return hook

    def _hook_post(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._receive is None:
                return None
            given, changed = self._finish(index, argument(args, kwargs))
            return replaced(args, kwargs, given) if changed else None

        return hook

    def _hook_given(self, index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._receive is None:
                return None
            given, changed = self._finish(index, output)
            return given if changed else None

        return hook

    def _keep(self, index: int, inputs: Tensor | None, site: Site, tensor: Tensor) -> None:
        """Notes pre until post comes."""
        if index in self._before:
            raise MeasurementError(
                f"Post must follow pre; of {self._named(index)} pre came twice. Check which "
                "modules its description names, and whether another part of the model uses them."
            )
        plain = self._checked(index, "pre", tensor)
        pre = self._of_site(index, site, plain)
        compiling = torch.compiler.is_compiling()
        known = compiling or index in self._followed or tensor.grad_fn is None
        inputs = pre if inputs is None else inputs
        recorded = None if known else tensor
        self._before[index] = _Before(inputs, pre, sample_of(pre).clone(), recorded)

    def _finish(self, index: int, tensor: Any) -> tuple[Any, bool]:
        """Hands on what there is before and after; `tensor` as the model may go on with it, and
        whether it is another one."""
        if index not in self._before:
            raise MeasurementError(
                f"Post must follow pre; of {self._named(index)} it comes first. Check "
                "which modules its description names."
            )
        before = self._before.pop(index)
        plain = self._checked(index, "post", tensor)
        recorded = not torch.compiler.is_compiling() and index in self._recording
        if recorded:
            self._recording.discard(index)
            torch.set_grad_enabled(bool(self._recording))
        if before.recorded is not None:
            self._check_follows(index, before.recorded, tensor)
            if recorded and plain.dtype.itemsize > 2 and plain.numel():
                self._check_is_no_factor(index, before.recorded, tensor)
            self._followed.add(index)
        post = self._of_site(index, self.sites[index][1], plain)
        _tap(before.inputs, before.pre, post, before.sample, self._order, self._number, index)
        return (plain, True) if recorded else (tensor, False)

    # Whether post follows from pre

    def _recorded(self, index: int, plain: Tensor, tensor: Tensor) -> tuple[Tensor, bool]:
        """`tensor` so that autograd records what happens to it from now on, where that was never
        seen and does not disturb; and whether it is another one."""
        if (
            torch.compiler.is_compiling()
            or index in self._followed
            or torch.is_grad_enabled()
            or torch.is_inference_mode_enabled()
            or index in self._recording
        ):
            return tensor, False
        self._recording.add(index)
        torch.set_grad_enabled(True)
        return plain.requires_grad_().clone(), True

    def _check_follows(self, index: int, pre: Tensor, post: Tensor) -> None:
        assert pre.grad_fn is not None
        way = way_from(pre.grad_fn, post)
        if way != "directly":
            raise MeasurementError(
                f"Post must follow from pre through the nonlinearity alone; of "
                f"{self._named(index)} it follows {way}. Check which modules its description "
                "names: those of one FFN, the projection before its nonlinearity and the one after."
            )

    def _check_is_no_factor(self, index: int, pre: Tensor, post: Tensor) -> None:
        site = self.sites[index][0]
        if site.part != slice(None) or pre.numel() != post.numel():
            return  # a part of it may be a factor, and is not pre
        if is_factor(pre, post, site.feature_axis):
            raise MeasurementError(
                f"Pre must be what the nonlinearity gets; of {self._named(index)} it is what the "
                "nonlinearity's output is multiplied with. Name the gate."
            )

    def _forget(self) -> None:
        """Ends a forward pass, however it went."""
        if self._recording:
            self._recording.clear()
            torch.set_grad_enabled(False)
        self._before.clear()
        self._times.clear()

    # What features must be

    def _checked(self, index: int, site: str, features: Any) -> Tensor:
        """The tensor, detached.

        Raises:
            MeasurementError: unless it is one plain tensor of floats.
        """
        if isinstance(features, DTensor):
            raise self._split(index)
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise MeasurementError(
                f"Features must be one tensor of floats; {site} of {self._named(index)} is "
                f"{type(features).__name__}. Give the modules whose output (pre) and first "
                "argument (post) are the features."
            )
        if torch.compiler.is_compiling():
            return features.detach()
        if features.is_nested or features.layout != torch.strided or features.is_quantized:
            kind = "nested" if features.is_nested else str(features.layout)
            raise MeasurementError(
                f"Features must be one plain, strided tensor; {site} of {self._named(index)} is "
                f"{'quantized' if features.is_quantized else kind}. Of nn.TransformerEncoder: "
                "torch.backends.mha.set_fastpath_enabled(False) keeps it dense, and a mask leaves "
                "padding out."
            )
        if type(features).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise MeasurementError(
                f"Features must be one plain tensor; {site} of {self._named(index)} is "
                f"{type(features).__name__}, whose numbers only its own operators can read."
            )
        return features.as_subclass(Tensor).detach()

    def _of_site(self, index: int, site: Site, tensor: Tensor) -> Tensor:
        axis, declared = site.feature_axis, site.declared
        if not -tensor.ndim <= axis < tensor.ndim or (
            declared is not None and tensor.shape[axis] != declared
        ):
            raise MeasurementError(
                f"The axis that holds the features of {self._named(index)} must be as wide as "
                f"{type(site.module).__name__} declares, {declared}; axis {axis} of "
                f"{tuple(tensor.shape)} is not."
            )
        return site.features(tensor)

    def _split(self, index: int) -> MeasurementError:
        return MeasurementError(
            "Features must be whole, since the spectra of slices do not add up; those of "
            f"{self._named(index)} are split over processes by tensor parallelism. Train with "
            "data parallelism or FSDP."
        )

    def _named(self, index: int) -> str:
        return named(self.ffns[index])


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module gets: the first positional argument, or the one tensor given by keyword."""
    if args:
        return args[0]
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another tensor in the place where `argument` found one."""
    if args:
        return (tensor, *args[1:]), kwargs
    return args, {k: tensor if isinstance(v, Tensor) else v for k, v in kwargs.items()}


def is_tap(hook: object) -> bool:
    """Whether a hook of a module is a probe's, which looks at features and leaves them."""
    return getattr(hook, "__module__", None) == __name__


def sample_of(features: Tensor) -> Tensor:
    """Some of the samples, from all over them."""
    rows = features.reshape(-1, features.shape[-1])
    return rows[:: max(1, len(rows) // SAMPLES)]


_numbers = count()
_probes: WeakValueDictionary[int, Probe] = WeakValueDictionary()


@torch.library.custom_op("nerve::tap", mutates_args={"order"})
def _tap(
    inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor, order: Tensor, probe: int, index: int
) -> None:
    """Gives features to a probe: an operator, so that compiled code holds it as it is.

    It is said to change `order`, so that the compiler neither drops nor reorders it.
    """
    _probes[probe].take(index, inputs, pre, post, sample)


@_tap.register_fake
def _(
    inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor, order: Tensor, probe: int, index: int
) -> None:
    """Tracing taps nothing."""
