"""Null models: the runs as they would be if there were nothing to find.

Each is a function from runs to runs. It replaces the spectra and keeps the losses, so a check that
uses only losses is tested only by the permutation of labels.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from criteria.measured import Measured
from criteria.values import seconds

Labels = Literal["design", "step", "layer", "spectrum", "measured"]
"""What a check distinguishes by labels, and what is therefore permuted."""

N_PERMUTATIONS = 400
ALL_UP_TO = 6
"""With at most this many compared runs, all orders of designs are used, not a sample."""

CHANCE = 0.05
"""A check passes the permutation if it holds in more than this share of permutations."""


def untrained(runs: Measured) -> Measured:
    """A network that is never trained: every step has the spectra of step 0."""
    return runs.with_spectra(
        {
            name: np.repeat(values[:, :1], len(runs.steps), 1)
            for name, values in runs.spectra.items()
        }
    )


def clock(runs: Measured) -> Measured:
    """Every metric is 1 + log(step + 1) in every run and layer; with 1 so that log PR exists."""
    return _clock(runs, 1 + np.log1p(runs.steps))


def clock_backwards(runs: Measured) -> Measured:
    """A clock that falls to 1, for metrics that should fall according to a claim."""
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
"""The null models by name; a check passes one if it holds on any of its functions."""


def permutations(runs: Measured, labels: Labels, compared: Sequence[str]) -> Iterator[Measured]:
    """Runs with permuted labels, a fixed set, without permutations that change nothing.

    - `design`: design and seed are permuted among the runs of the compared designs, without orders
      that only rename whole designs, which would turn an opposite effect into one that holds
    - `step`: the spectra are permuted over the steps, separately in each run; losses stay
    - `layer`: the layers are permuted, separately in each run
    - `spectrum`: the spectra of each design are assigned to another; losses stay
    - `measured`: in each of the compared runs, the times of measurements and of steps are exchanged
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
    """All orders of a few places; of more, a fixed sample."""
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
