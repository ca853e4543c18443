"""Null models: what a check would be computed from if there were nothing to find.

Each is a function from runs to runs. The spectra are replaced and the losses stay, so that a check
on losses alone meets only the permutation of labels.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from criteria.measured import Measured
from criteria.values import seconds

Labels = Literal["design", "step", "layer", "spectrum", "measured"]
"""What a check tells apart by its label, and so what is permuted."""

N_PERMUTATIONS = 400
ALL_UP_TO = 6
"""With so many compared runs or fewer all orders of designs are gone through, not a sample."""

CHANCE = 0.05
"""A check passes the permutation where it holds in more than this share of them."""


def untrained(runs: Measured) -> Measured:
    """A network that is never trained: every step has the spectra of step 0."""
    return runs.with_spectra(
        {
            name: np.repeat(values[:, :1], len(runs.steps), 1)
            for name, values in runs.spectra.items()
        }
    )


def clock(runs: Measured) -> Measured:
    """Every metric is 1 + log(step + 1), in every run and layer: 1, so that PR has a logarithm."""
    return _clock(runs, 1 + np.log1p(runs.steps))


def clock_backwards(runs: Measured) -> Measured:
    """A clock that falls to 1: for metrics that a claim says to fall."""
    times = np.log1p(runs.steps)
    return _clock(runs, 1 + times[-1] - times)


def identity(runs: Measured) -> Measured:
    """An activation that does nothing: post is pre, JS is 0."""
    pre = {name: values for name, values in runs.spectra.items() if name.endswith("_pre")}
    post = {name.replace("_pre", "_post"): values for name, values in pre.items()}
    return runs.with_spectra(pre | post | {"js": np.zeros_like(runs.spectra["js"])})


FIXED: dict[str, tuple[Callable[[Measured], Measured], ...]] = {
    "untrained": (untrained,),
    "clock": (clock, clock_backwards),
    "identity": (identity,),
}
"""By name; a check passes one where it holds on any of its functions."""


def permutations(runs: Measured, labels: Labels, compared: Sequence[str]) -> Iterator[Measured]:
    """Runs with permuted labels, a fixed set; those that change nothing are left out.

    - `design`: design and seed go to other runs, among those of the compared designs; orders that
      only rename whole designs are left out: they would turn an opposite effect into one that holds
    - `step`: the spectra of each run go to other steps, in each run by themselves; losses stay
    - `layer`: the layers change places, in each run by themselves
    - `spectrum`: the spectra of each design go to another; losses stay
    - `measured`: what was measured and what was not change places, in each of the compared runs
      by themselves: a step takes a measurement's time, and a measurement a step's
    """
    if labels == "design":
        yield from _designs(runs, np.flatnonzero(runs.of(compared)))
        return
    if labels == "measured":
        yield from _durations(runs, np.flatnonzero(runs.of(compared)))
        return
    generator = np.random.default_rng(0)
    for _ in range(N_PERMUTATIONS):
        changed = _PERMUTE[labels](runs, generator)
        if changed is not None:
            yield changed


def _clock(runs: Measured, times: np.ndarray) -> Measured:
    return runs.with_spectra(
        {
            name: np.broadcast_to(times[None, :, None], values.shape)
            for name, values in runs.spectra.items()
        }
    )


def _designs(runs: Measured, own: np.ndarray) -> Iterator[Measured]:
    for places in _orders(len(own)):
        order = np.arange(len(runs))
        order[own] = own[list(places)]
        design = runs.design[order]
        renamed = set(zip(runs.design[own].tolist(), design[own].tolist(), strict=True))
        if len(renamed) > len(set(runs.design[own].tolist())):
            yield replace(runs, design=design, seed=runs.seed[order])


def _orders(n: int) -> Iterator[Sequence[int]]:
    """All orders of a few places, of more a fixed sample."""
    if n <= ALL_UP_TO:
        yield from itertools.permutations(range(n))
        return
    generator = np.random.default_rng(0)
    for _ in range(N_PERMUTATIONS):
        yield generator.permutation(n).tolist()


def _steps(runs: Measured, generator: np.random.Generator) -> Measured | None:
    return _shuffled(runs, generator, axis=1)


def _layers(runs: Measured, generator: np.random.Generator) -> Measured | None:
    return _shuffled(runs, generator, axis=2)


def _shuffled(runs: Measured, generator: np.random.Generator, axis: int) -> Measured | None:
    n = runs.spectra["js"].shape[axis]
    order = generator.permuted(np.tile(np.arange(n), (len(runs), 1)), axis=1)
    if (order == np.arange(n)).all():
        return None
    index = order[:, :, None] if axis == 1 else order[:, None, :]
    return runs.with_spectra(
        {name: np.take_along_axis(values, index, axis) for name, values in runs.spectra.items()}
    )


def _spectra(runs: Measured, generator: np.random.Generator) -> Measured | None:
    names = sorted(set(runs.design.tolist()))
    given = dict(zip(names, generator.permutation(names), strict=True))
    if all(name == other for name, other in given.items()):
        return None
    where = {(d, s): i for i, (d, s) in enumerate(zip(runs.design, runs.seed, strict=True))}
    fallback = {d: i for (d, _), i in reversed(where.items())}
    order = [
        where.get((str(given[d]), s), fallback[str(given[d])])
        for d, s in zip(runs.design, runs.seed, strict=True)
    ]
    return runs.with_spectra({name: values[order] for name, values in runs.spectra.items()})


def _durations(runs: Measured, own: np.ndarray) -> Iterator[Measured]:
    measurement, step = seconds(runs)
    changes = np.zeros(len(runs), bool)
    for change in itertools.islice(
        itertools.product([False, True], repeat=len(own)), 1, 1 + N_PERMUTATIONS
    ):
        changes[own] = change
        measuring = np.where(changes, step, measurement) * len(runs.steps)
        training = np.where(changes, measurement, step) * runs.steps[-1]
        took = {
            "final.measuring_seconds": measuring,
            "final.train_seconds": measuring + training,
        }
        yield replace(runs, runs=runs.runs.assign(**took))


_PERMUTE: dict[Labels, Callable[[Measured, np.random.Generator], Measured | None]] = {
    "step": _steps,
    "layer": _layers,
    "spectrum": _spectra,
}
