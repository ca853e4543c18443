"""Determines in one forward pass which features depend on which, element by element.

The output of every projection becomes an autograd leaf; the input of each projection is then
differentiated with respect to these leaves. Where that does not show how an input depends on them,
because an FFN is dead in these samples, or all of them are in the linear part of its nonlinearity,
a second pass has random values in place of these outputs.
"""

from collections import Counter
from collections.abc import Callable, Sequence
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
        links: the links in the order in which they end.
        n_links: by key, the maximum number of times that each link appeared in one pass.
        hidden: projections to fewer features without derivatives, because of activation
            checkpointing or disabled autograd.
        not_finite: projections that returned NaN in every sample.
        linear: for each projection whose input is a linear or constant function of the outputs of
            others of its width, those others.
        ran: projections whose output was seen.
    """

    projections: Sequence[nn.Module]
    is_gate: Callable[[nn.Module], bool]
    products: Sequence[Products] = ()
    also: Callable[[], list[RemovableHandle]] = list
    links: dict[tuple[Any, ...], Link] = field(default_factory=dict)
    n_links: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    hidden: dict[nn.Module, None] = field(default_factory=dict)
    not_finite: dict[nn.Module, None] = field(default_factory=dict)
    linear: dict[nn.Module, Sequence[nn.Module]] = field(default_factory=dict)
    ran: dict[nn.Module, None] = field(default_factory=dict)
    _now: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    _leaves: list[Leaf] = field(default_factory=list)
    _order: dict[nn.Module, int] = field(default_factory=dict)
    _doubted: dict[nn.Module, Sequence[nn.Module]] = field(default_factory=dict)
    _again: dict[nn.Module, Sequence[nn.Module]] = field(default_factory=dict)
    _asks: bool = False
    _hooked: dict[nn.Module, list[RemovableHandle]] = field(default_factory=dict)

    def watch(self, run: Callable[[], object]) -> None:
        """Runs the model once, with its projections' outputs as leaves, and once more if that does
        not show how all inputs depend on them."""
        self._doubted.clear()
        self._pass(run)
        self._again, self._doubted = self._doubted, {}
        if self._again:
            links, counts = dict(self.links), Counter(self.n_links)
            for key, link in links.items():
                if link.post in self._again:
                    del self.links[key], self.n_links[key]
            try:
                self._pass(run)
            except Exception:  # of any kind, where a model cannot run with random values
                self.links, self.n_links, self._doubted = links, counts, self._again
            self.linear |= self._doubted
            ordered = sorted(self.links.items(), key=lambda item: self._order[item[1].post])
            self.links, self._again = dict(ordered), {}

    def _pass(self, run: Callable[[], object]) -> None:
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
        self.linear.clear()
        self.ran.clear()
        self._order.clear()

    def _hook(self, module: nn.Module) -> None:
        if module not in self._hooked:
            self._hooked[module] = [
                module.register_forward_pre_hook(self._take_input, with_kwargs=True),
                module.register_forward_hook(self._take_output),
            ]

    def _take_output(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if self._asks or not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        leaf = output.detach()
        if not self._again:  # random values say nothing of the model
            samples = rows_of(leaf, module)
            if len(samples) and samples.isnan().any(1).all():  # infinite logits may be a mask
                self.not_finite[module] = None
            self.ran[module] = None
        if any(module in each for each in self._again.values()):
            generator = torch.Generator().manual_seed(len(self._leaves))
            leaf = torch.randn(leaf.shape, generator=generator).to(leaf)
        leaf.requires_grad_()
        self._leaves.append(Leaf(module, leaf))
        return leaf.clone()  # a nonlinearity may overwrite it

    def _take_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        features = argument(args, kwargs)
        if self._asks or not isinstance(features, Tensor):
            return
        if torch.is_grad_enabled() and not features.requires_grad:
            return
        if self._again and module not in self._again:
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
            link, doubted = link_of(module, rows, self._leaves, self.is_gate)
        except CheckpointError:
            self._hide(module)
            return
        except RuntimeError:  # no derivative, for example of what a recurrence has overwritten
            return
        finally:
            self._asks = False
        self._order.setdefault(module, len(self._order))
        if doubted:
            self._doubted.setdefault(module, doubted)
        if link is not None:
            self.links.setdefault(link.key, link)
            self._now[link.key] += 1

    def _hide(self, post: nn.Module) -> None:
        widths = declared_widths(post)
        if widths is not None and widths.d_in > widths.d_out:
            self.hidden[post] = None
