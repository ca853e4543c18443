"""Derives steps from the names of checkpoints."""

import re
from collections.abc import Sequence

from nerve.config import require, require_count

_OF_A_STEP = re.compile(
    r"(?:step|checkpoint|ckpt|iter(?:ation)?)s?[-_=.]?(\d+)(?!\d)", re.IGNORECASE
)
_NUMBER = re.compile(r"\d+")
_NOT_PLAIN = re.compile(r"[kmb](?![a-z])|[.,]\d|e\d", re.IGNORECASE)
"""What follows digits that are only the first part of a number, as in 10k, 70m, 1.5 and 1e6."""


def steps_of(names: Sequence[str], given: Sequence[int] | None) -> list[int]:
    """The step of each checkpoint: as given, or from its name.

    `step_100`, `checkpoint-100` and `ckpt/100` contain it; in a series, the last number of any
    other name is its step, too. A single checkpoint whose name has no step gets step 0.

    Raises:
        ConfigError: for a number of steps that is not that of the checkpoints, a name without a
            plain number (`10k`, `pythia-70m`), and two checkpoints of one step.
    """
    if given is not None:
        require(
            len(given) == len(names),
            f"--steps gives one step for each model; got {len(given)} for {len(names)}: "
            f"{', '.join(names[:4])}{', …' if len(names) > 4 else ''}.",
        )
        for step in given:
            require_count("--steps", step, least=0)
        steps = list(given)
    else:
        steps = [_step_of(name, is_single=len(names) == 1) for name in names]
    for i, step in enumerate(steps):
        first = steps.index(step)
        require(
            first == i,
            f"Checkpoints of one series must have different steps; {names[first]} and {names[i]} "
            f"both have step {step}. Leave one out, or give --steps.",
        )
    return steps


def _step_of(name: str, *, is_single: bool) -> int:
    last = re.split(r"[/@]", name.rstrip("/"))[-1]
    spans = [match.span(1) for match in _OF_A_STEP.finditer(last)]
    if not spans and is_single:
        return int(last) if last.isdigit() else 0
    spans = spans or [match.span() for match in _NUMBER.finditer(last)]
    require(
        bool(spans),
        f"The steps of a series come from the names, as in step_100; {name} contains none. Set "
        "them with --steps 0,100,…, in the order of the models.",
    )
    start, end = spans[-1]
    require(
        not _NOT_PLAIN.match(last, end),
        f"A name must give its step as a plain number, as in step_100; got {name}. Set the steps "
        "with --steps 0,100,…, in the order of the models.",
    )
    return int(last[start:end])
