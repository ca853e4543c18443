"""Derives steps from the names of checkpoints."""

import re
from collections.abc import Sequence

from nerve.config import require, require_count

_OF_A_STEP = re.compile(
    r"(?:step|checkpoint|ckpt|iter(?:ation)?)s?[-_=.]?(\d+)(?!\d)", re.IGNORECASE
)
_NUMBER = re.compile(r"\d+")


def steps_of(names: Sequence[str], given: Sequence[int] | None) -> list[int]:
    """The step of each checkpoint: as given, or from its name.

    `step_100`, `checkpoint-100` and `ckpt/100` contain it; in a series, any last number of the name
    counts as well. A single checkpoint whose name has no step gets step 0.

    Raises:
        ConfigError: for a number of steps that is not that of the checkpoints, names that do not
            tell, and two checkpoints of one step.
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
    found = [*_OF_A_STEP.finditer(last)]
    numbers = [match[0] for match in _NUMBER.finditer(last)]
    if found:
        text, end = found[-1][1], found[-1].end(1)
        require(
            last[end : end + 1].lower() not in ("k", "m", "b"),
            f"A name must give its step as a plain number; got {name}. Set it with --steps.",
        )
        return int(text)
    if is_single:
        return int(last) if last.isdigit() else 0
    require(
        bool(numbers),
        f"The steps of a series come from the names, as in step_100; {name} contains none. Set "
        "them with --steps 0,100,…, in the order of the models.",
    )
    return int(numbers[-1])
