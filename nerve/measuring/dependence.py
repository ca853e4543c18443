"""Determines in one forward pass which features depend on which, element by element.

The output of every projection becomes an autograd leaf; the input of each projection is then
differentiated with respect to these leaves.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from torch.utils.hooks import RemovableHandle

from nerve.measuring.ffns import argument, declared_widths
from nerve.measuring.link import Leaf, Link, link_of, rows_of
from nerve.measuring.slices import Products


@dataclass
class Dependence:
    """Collects what the forward passes inside `watch` show.

    Attributes:
        projections: modules whose outputs become leaves, in addition to slices of parameters.
        is_gate: whether a projection's name says so.
        products: those of the modules that have such parameters.
        also: installs further hooks.
        links: the links in order of appearance.
        n_links: by key, the maximum number of times that each link appeared in one pass.
        hidden: projections to fewer features without derivatives, because of activation
            checkpointing or disabled autograd.
        not_finite: projections that returned NaN in every sample.
    """

    projections: Iterable[nn.Module]
    is_gate: Callable[[nn.Module], bool]
    products: Sequence[Products] = ()
    also: Callable[[], list[RemovableHandle]] = list
    links: dict[tuple[Any, ...], Link] = field(default_factory=dict)
    n_links: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    hidden: dict[nn.Module, None] = field(default_factory=dict)
    not_finite: dict[nn.Module, None] = field(default_factory=dict)
    _now: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    _leaves: list[Leaf] = field(default_factory=list)
    _asks: bool = False
    _hooked: dict[nn.Module, list[RemovableHandle]] = field(default_factory=dict)

    def watch(self, run: Callable[[], object]) -> None:
        """Runs the model once, with its projections' outputs as leaves."""
        handles: list[RemovableHandle] = []
        try:
            for module in self.projections:
                self._hook(module)
            for products in self.products:
                handles += products.install(lambda: True, self._hook)
            handles += self.also()
            with torch.inference_mode(False), torch.enable_grad():
                run()
        finally:
            for handle in chain(handles, *self._hooked.values()):
                handle.remove()
            self._hooked.clear()
            self._leaves.clear()
            self.n_links |= self._now  # the larger count
            self._now.clear()

    def forget(self) -> None:
        """Discards everything that was recorded."""
        self.links.clear()
        self.n_links.clear()
        self.hidden.clear()
        self.not_finite.clear()

    def _hook(self, module: nn.Module) -> None:
        if module not in self._hooked:
            self._hooked[module] = [
                module.register_forward_pre_hook(self._take_input, with_kwargs=True),
                module.register_forward_hook(self._take_output),
            ]

    def _take_output(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if self._asks or not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        samples = rows_of(output.detach(), module)
        if len(samples) and samples.isnan().any(1).all():  # infinite logits may be a mask
            self.not_finite[module] = None
        leaf = output.detach().requires_grad_()
        self._leaves.append(Leaf(module, leaf))
        return leaf.clone()  # a nonlinearity may overwrite it

    def _take_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        features = argument(args, kwargs)
        if self._asks or not isinstance(features, Tensor):
            return
        if torch.is_grad_enabled() and not features.requires_grad:
            return
        rows = rows_of(features, module)
        width = rows.shape[1]
        fitting = {leaf.rows.shape[1] for leaf in self._leaves if len(leaf.rows) == len(rows)}
        if len(rows) < 2 or not fitting & {width, 2 * width}:
            return
        if not features.requires_grad:
            self._hide(module)
            return
        self._asks = True  # activation checkpointing reruns part of the model for it
        try:
            link = link_of(module, rows, self._leaves, self.is_gate)
        except CheckpointError:
            self._hide(module)
            return
        except RuntimeError:  # no derivative, for example of what a recurrence has overwritten
            return
        finally:
            self._asks = False
        if link is not None:
            self.links.setdefault(link.key, link)
            self._now[link.key] += 1

    def _hide(self, post: nn.Module) -> None:
        widths = declared_widths(post)
        if widths is not None and widths.d_in > widths.d_out:
            self.hidden[post] = None
