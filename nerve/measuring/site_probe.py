"""Taps the inputs or outputs of modules around an FFN while their model runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from nerve.measuring.clock import UNTIMED, Clock, Untimed
from nerve.measuring.ffns import Site
from nerve.measuring.tap import hook_at, of_site, plain, put_last

ReceiveSite = Callable[[int, str, Tensor], None]
"""Takes an FFN's index, the name of the site and its features, detached, `[*samples, width]`."""


class SiteProbe:
    """Taps sites around FFNs between `start()` and `stop()`; for compiled code, see `Probe`.

    Args:
        sites: the sites of each FFN, by name.
        names: the names of the FFNs in messages.
        clock: counts the time that tapping takes.
    """

    def __init__(
        self,
        sites: Sequence[Mapping[str, Site]],
        names: Sequence[str],
        clock: Clock | Untimed = UNTIMED,
    ) -> None:
        self._clock = clock
        self._taps = [
            (index, name, site, f"{name} of {where}")
            for index, (each, where) in enumerate(zip(sites, names, strict=True))
            for name, site in each.items()
        ]
        self._receive: ReceiveSite | None = None
        self._handles: list[RemovableHandle] = []
        self._number = next(_numbers)
        self._order = torch.zeros(())
        _probes[self._number] = self

    def install(self) -> None:
        """Registers the hooks."""
        for number, (_, _, site, _) in enumerate(self._taps):
            look = self._clock.around(partial(self._tap, number))
            self._handles.append(hook_at(site, self._is_on, look))

    def remove(self) -> None:
        """Removes the hooks; allowed at any time."""
        self.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self, receive: ReceiveSite) -> None:
        """Starts calling `receive` for each tensor that appears at a site."""
        for handle in self._handles:
            put_last(handle)
        self._receive = receive

    def stop(self) -> None:
        """Stops tapping; allowed at any time."""
        self._receive = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """As `Probe.paused`."""
        receive, self._receive = self._receive, None
        try:
            yield
        finally:
            self._receive = receive

    def take(self, number: int, features: Tensor) -> None:
        """Receives features from the taps; does nothing while stopped."""
        if self._receive is not None:
            index, name, *_ = self._taps[number]
            with self._clock:
                self._receive(index, name, features)

    def _is_on(self) -> bool:
        return self._receive is not None

    def _tap(self, number: int, _: Any, features: Any) -> None:
        site, where = self._taps[number][2:]
        if site.of == "output" and isinstance(features, tuple | list) and features:
            features = features[0]
        tensor = of_site(plain(features, "the tensor", where), site, where)
        _tap_site(tensor, self._order, self._number, number)


_numbers = count()
_probes: WeakValueDictionary[int, SiteProbe] = WeakValueDictionary()


@torch.library.custom_op("nerve::tap_site", mutates_args={"order"})
def _tap_site(features: Tensor, order: Tensor, probe: int, number: int) -> None:
    """Gives features to a probe: an operator, as that of `nerve.measuring.probe`."""
    _probes[probe].take(number, features)


@_tap_site.register_fake
def _(features: Tensor, order: Tensor, probe: int, number: int) -> None:
    """Tracing taps nothing."""
