"""Taps the features of feed-forward networks (FFNs) while their model runs.

A probe knows sites and tensors, but nothing about covariances or metrics: it passes features to its
`receive` function as they appear, so that no activation is kept.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nerve.errors import MeasurementError
from nerve.measuring.clock import UNTIMED, Clock, Untimed
from nerve.measuring.ffns import (
    FFN,
    Site,
    declared_widths,
    last,
    n_runs_of,
    named,
    require_distinct,
    sample_of,
    sites_of,
    tokens_of,
)
from nerve.measuring.following import Following
from nerve.measuring.site_probe import ReceiveSite, SiteProbe
from nerve.measuring.slices import products_of
from nerve.measuring.tap import (
    check_same_samples,
    check_whole,
    hook_at,
    of_site,
    plain,
    put_last,
    registered,
    tap,
)
from nerve.spectra.host_copy import Flag

Receive = Callable[[int, Tensor, Tensor, Tensor], None]
"""Takes an FFN's index and its features, detached: its input `[*samples, d_in]` (pre itself if pre
is the input of a module), and what is before and after its nonlinearity, `[*samples, d_ff]`."""

_COUNTS = (
    "If layers are shared, looped or skipped, or a module runs twice by design, describe it with "
    "n_runs=None, which pools all runs. Otherwise the model must be called once per forward pass, "
    "without activation checkpointing, and a compiled model through the module that was compiled."
)
_NONE_RAN = (
    "No other FFN ran either. A measured step must call the model, even if it is skipped (a "
    "training_step that returns None), and the model must call the described modules; call a "
    "compiled model through the module that was compiled. Held-out batches (source='heldout') do "
    "not depend on which steps are skipped."
)


class _Before(NamedTuple):
    """What is known of an FFN before its nonlinearity has run.

    Attributes:
        inputs, pre: as `Receive` takes them.
        sample: of pre, as it was when it appeared.
        version: how often pre was modified in place by then, as `_version_of` has it.
        recorded: pre as the model continues with it, if autograd records what follows.
    """

    inputs: Tensor
    pre: Tensor
    sample: Tensor
    version: int | None
    recorded: Tensor | None


def _version_of(pre: Tensor, site: Site) -> int | None:
    """How often a tensor was modified in place; None if torch does not count it for pre alone.
    Changes are then detected by comparing a sample of its values."""
    is_counted = not torch.compiler.is_compiling() and not pre.is_inference()
    return pre._version if is_counted and site.part == slice(None) else None


class Probe:
    """Taps the features of FFNs in every forward pass between `start()` and `stop()`.

    Its hooks must be in place when a model is compiled: call `install()` before the first call of
    compiled code. That code then exists in two versions, with and without the taps, and starting
    and stopping selects one; a stopped probe costs nothing.

    The promises of descriptions are checked at each run. That post depends on pre with no matrix in
    between is checked at the first run of each FFN (`Following`).

    Args:
        ffns: the FFNs to tap.
        around: for each FFN, the sites around it to tap, too, by name.
        clock: counts the time that tapping takes.

    Raises:
        MeasurementError: if there is none, if two share layer and name, or if pre is the output of
            a module without weights.
    """

    def __init__(
        self,
        ffns: Sequence[FFN],
        around: Sequence[Mapping[str, Site]] | None = None,
        clock: Clock | Untimed = UNTIMED,
    ) -> None:
        require_distinct(ffns)
        self.ffns = ffns
        self._clock = clock
        self.sites = [sites_of(ffn) for ffn in ffns]
        self._names = [named(ffn) for ffn in ffns]
        self._around = None if around is None else SiteProbe(around, self._names, clock)
        self.thread = 0
        self._receive: Receive | None = None
        self._before: dict[int, _Before] = {}
        self._times: Counter[int] = Counter()
        self._unchanged: list[tuple[int, Flag]] = []
        self._tokens: dict[nn.Module, Tensor] = {}
        described = (i for i, ffn in enumerate(ffns) if not isinstance(ffn, nn.Module))
        self._following = Following(described)
        self._handles: list[RemovableHandle] = []
        self._number = registered(self)
        self._order = torch.zeros(())

    def install(self) -> None:
        """Registers the hooks."""
        # Those that watch products come first: slices run within them.
        for each in products_of(self.sites):
            self._handles += each.install(self._is_on)
        for module in {tokens.module for ffn in self.ffns if (tokens := tokens_of(ffn))}:
            tokens = Site(module, "input")
            self._handles.append(hook_at(tokens, self._is_on, partial(self._note, module)))
        for index, (pre, post) in enumerate(self.sites):
            self._handles += [
                hook_at(pre, self._is_on, self._clock.around(partial(self._begin, index))),
                hook_at(post, self._is_on, self._clock.around(partial(self._finish, index))),
            ]
        if self._around is not None:
            self._around.install()

    def remove(self) -> None:
        """Removes the hooks; allowed at any time."""
        self.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._around is not None:
            self._around.remove()

    def start(self, receive: Receive, receive_site: ReceiveSite | None = None) -> None:
        """Starts calling `receive` once for each run of an FFN, and `receive_site` for each tensor
        at a site around one, in forward passes that `finish_forward` ends."""
        for handle in self._handles:
            put_last(handle)
        self._receive, self.thread = receive, threading.get_ident()
        if self._around is not None and receive_site is not None:
            self._around.start(receive_site)
        self._following.start_forward()

    def stop(self) -> None:
        """Stops tapping; allowed at any time."""
        self._receive = None
        if self._around is not None:
            self._around.stop()
        self._forget()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Taps nothing within the block; afterwards the current pass continues to be tapped."""
        receive, self._receive = self._receive, None
        with ExitStack() as stack:
            if self._around is not None:
                stack.enter_context(self._around.paused())
            try:
                yield
            finally:
                self._receive = receive

    @property
    def is_taking(self) -> bool:
        """Whether it is tapping, between `start()` and `stop()`."""
        return self._is_on()

    @property
    def is_recording(self) -> bool:
        """Whether autograd records what happens between pre and post of an FFN."""
        return self._following.is_recording

    def finish_forward(self) -> None:
        """Ends one forward pass: every FFN must have run as often as its description says.

        Raises:
            MeasurementError: for an FFN that did not, whose post never came, or whose pre was
                overwritten.
        """
        times, pending, unchanged = Counter(self._times), {*self._before}, [*self._unchanged]
        self._following.finish_forward()
        self._forget()
        for index in (index for index, is_same in unchanged if not is_same):
            raise self._modified(index)
        for index, ffn in enumerate(self.ffns):
            promised = n_runs_of(ffn)
            if index in pending:
                raise MeasurementError(
                    f"Post must be computed after pre; for {named(ffn)} it was never computed. "
                    "Check the modules in its description, and whether the forward pass ended "
                    "early."
                )
            if promised is not None and times[index] != promised:
                raise MeasurementError(
                    f"{named(ffn)} is described with n_runs={promised} per measured forward pass; "
                    f"it ran {times[index]} times. "
                    + (_COUNTS if any(times.values()) else _NONE_RAN)
                )

    def tokens_of(self, index: int) -> Tensor | None:
        """For an expert, all tokens among which its own are, `[*tokens, d_in]`, as far as the
        forward pass has shown them; None for another FFN, or if there were none."""
        site = tokens_of(self.ffns[index])
        tokens = None if site is None else self._tokens.get(site.module)
        return None if site is None or tokens is None else site.features(tokens)

    def take(self, index: int, inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor) -> None:
        """Receives features from the taps, and a sample of pre from when it appeared; does nothing
        while stopped.

        Raises:
            MeasurementError: for features that do not belong to the FFN.
        """
        if self._receive is None:
            return
        with self._clock:
            check_whole(self.sites[index][0].module, self._names[index])
            check_same_samples(pre, post, self._names[index])
            unchanged = torch.isclose(sample_of(pre), sample, rtol=0, atol=0, equal_nan=True).all()
            self._unchanged.append((index, Flag(unchanged)))
            self._times[index] += 1
            self._receive(index, inputs, pre, post)

    def _is_on(self) -> bool:
        return self._receive is not None

    def _note(self, module: nn.Module, given: Any, _: Any) -> None:
        """Keeps the input of a module that receives all tokens of its experts."""
        if not torch.compiler.is_compiling():
            self._tokens[module] = plain(given, "input", type(module).__name__)

    # Everything is tapped once post is there: a tap of pre alone, ahead of the nonlinearity, would
    # make compiled code keep more for the backward pass than it keeps without.

    def _begin(self, index: int, given: Any, tensor: Any) -> Any:
        """Keeps pre and the input of its module until post appears; returns what the model
        continues with in place of `tensor`."""
        site, where = self.sites[index][0], self._names[index]
        inputs = None  # pre itself is the input of a module
        if site.of == "output":
            widths = declared_widths(site.module)
            axis = site.feature_axis if widths is None else widths.axis
            inputs = last(plain(given, "input", where), axis)
        tensor, is_new = self._following.begin(index, tensor, where)
        if index in self._before:
            raise MeasurementError(
                f"Post must be computed after pre; for {where} pre was computed twice. Check the "
                "modules in its description, and whether another part of the model uses them."
            )
        pre = of_site(plain(tensor, "pre", where), site, where)
        recorded = self._following.recorded(index, tensor)
        sample = sample_of(pre).clone()
        inputs = pre if inputs is None else inputs
        self._before[index] = _Before(inputs, pre, sample, _version_of(pre, site), recorded)
        return tensor if is_new else None

    def _finish(self, index: int, given: Any, tensor: Any) -> Any:
        """Passes on the features before and after the nonlinearity; returns what the model
        continues with in place of `tensor`."""
        where = self._names[index]
        if index not in self._before:
            raise MeasurementError(
                f"Post must be computed after pre; for {where} it is computed first. Check the "
                "modules in its description, and whether the model still has them."
            )
        before = self._before.pop(index)
        if before.version != _version_of(before.pre, self.sites[index][0]):
            raise self._modified(index)
        plain_post = plain(tensor, "post", where)
        site, site_of_post = self.sites[index]
        is_new = self._following.end(index, before.recorded, tensor, before.inputs, site, where)
        post = of_site(plain_post, site_of_post, where)
        tap(before.inputs, before.pre, post, before.sample, self._order, self._number, index)
        return plain_post if is_new else None

    def _modified(self, index: int) -> MeasurementError:
        return MeasurementError(
            f"A nonlinearity must not modify its input; the one of {self._names[index]}, or the "
            "model before it, overwrites it. Use one with inplace=False, and change features in a "
            "copy of them."
        )

    def _forget(self) -> None:
        """Ends a forward pass, however it went."""
        self._following.forget()
        self._before.clear()
        self._times.clear()
        self._unchanged.clear()
        self._tokens.clear()
