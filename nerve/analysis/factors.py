"""Finds the configuration values that vary between runs, those that are constant, and those that
are confounded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd

from nerve.analysis.compare import COUNTS, NUMBERS
from nerve.analysis.groups import contrasts, pr_column
from nerve.analysis.leaves import leaves_of
from nerve.sites_and_groups import GROUP_SITES, GROUPINGS, POOLED
from nerve.storage.schema import METRIC_COLUMNS

DESIGN_FACTORS = (
    "normalization.kind",
    "normalization.placement",
    "activation.name",
    "position.name",
    "ffn.width",
    "ffn.gated",
    "ffn.constraint",
    "optimizer.name",
    "optimizer.lr",
    "model.kind",
    "model.n_layers",
    "model.d_model",
    "model.seq_len",
    "data.batch_size",
    "data.vocab_size",
    "trainer.max_steps",
)
"""The values by which runs are distinguished first, and which are reported if they are constant."""

_READ_AS_ANOTHER = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)|true|false|not set", re.IGNORECASE
)
"""The strings that `level_text` writes for numbers, booleans and missing values, or similar."""

_ESTIMATED = (
    *("pearson", "spearman", "given_clock", "given_lr", "kendall", "loss_kendall", "given_loss"),
    "exponent",
)
_PARTS = [group for groups in GROUPINGS.values() for group in groups]
"""The groups of all groupings."""

TAKEN = {
    *(*METRIC_COLUMNS, *NUMBERS, *(f"{name}_sd" for name in NUMBERS), *COUNTS),
    *("data", "heldout", "flag", "reason", "n_steps", "n_seeds", "n_flagged"),
    *("first_loss", "min_loss", "final_loss", "final_step", "target_loss", "reached"),
    *("depth", "middle", "region", "schedule", "clock", "metric", "window"),
    *("first_step", "n", "n_missing", "n_heldout", "n_points", "n_designs", "d_ff_min", "d_ff_max"),
    *(f"{name}{end}" for name in _ESTIMATED for end in ("", "_low", "_high")),
    *("null", "coefficient", "r_squared", "r_clock", "r_lr", "points"),
    *("site", "grouping", "group", "other", "pr_group", "pr_other", "ratio", "ratio_sd"),
    *(pr_column(site, group) for site in GROUP_SITES for group in (POOLED, *_PARTS)),
    *(pr_column(site, *pair) for _, site, *pair in contrasts()),
}
"""The columns of results that also have factors, whose values a factor of the same name would
replace."""


@dataclass(frozen=True)
class Factors:
    """The factors that distinguish runs.

    Args:
        varying: columns of `load_runs`, design factors first; no two split the runs in the same
            way.
        together: for some of `varying`, the other columns that it determines.
        constant: design factors with a single value, and that value.
        taken: keys that vary independently of `varying`, but cannot be factors because they have
            the name of a result. Designs that differ in one of them differ in more than a factor.
    """

    varying: tuple[str, ...]
    together: dict[str, tuple[str, ...]]
    constant: dict[str, str]
    taken: tuple[str, ...]


def find_factors(runs: pd.DataFrame) -> Factors:
    """Sorts the configuration leaves of `load_runs` into varying, confounded and constant ones.

    The seed, leaves of nerve-run that do not affect results (`EXCLUDED`), `_target_` keys and
    leaves with the name of a result are not factors. A leaf follows another if its effect could not
    be separated from that of the other:

    - if both split the runs in the same way, or at least those runs that have the leaf (such as the
      learning rate of a part of an optimizer, `optimizer.parts.main.build.lr`, and `optimizer.lr`)
    - if the other determines it, and not only because there are few designs: if the other is a name
      (`optimizer.name`), at least one of its levels must have several designs; if it is a number,
      all of its levels must
    """
    leaves = leaves_of(runs)
    ordered = [name for name in DESIGN_FACTORS if name in leaves]
    ordered += [name for name in leaves if name not in DESIGN_FACTORS and name not in TAKEN]
    ordered += [name for name in leaves if name in TAKEN]
    leaf_of = {name: _Leaf.of(leaves[name]) for name in ordered}
    designs = pd.factorize(runs["design_id"])[0]
    varying: list[str] = []
    taken: list[str] = []
    together: dict[str, list[str]] = {}
    for name, leaf in leaf_of.items():
        if len(leaf.texts) < 2:
            continue
        owner = next((each for each in varying if leaf.follows(leaf_of[each], designs)), None)
        if owner is None:
            (taken if name in TAKEN else varying).append(name)
        else:
            together.setdefault(owner, []).append(name)
    constant = {
        name: leaf_of[name].texts[0]
        for name in DESIGN_FACTORS
        if name in leaf_of and len(leaf_of[name].texts) == 1
    }
    return Factors(
        tuple(varying),
        {name: tuple(others) for name, others in together.items()},
        constant,
        tuple(taken),
    )


def levels_of(values: pd.Series) -> pd.Series:
    """The values of a factor as text; a missing value is a separate level."""
    if values.dtype == object:  # true and 1 are different levels
        return values.map(level_text)
    codes, levels = pd.factorize(values, use_na_sentinel=False)
    texts = np.array([level_text(level) for level in levels.astype(object)], dtype=object)
    return pd.Series(texts[codes] if len(texts) else texts, values.index, name=values.name)


def describe_ties(factors: Factors, n_shown: int = 6) -> list[str]:
    """Sentences about keys that cannot be factors, and about confounded keys."""
    sentences = [
        f"{name} varies, but cannot be a factor because it has the name of a result. Put it into a "
        f'group of the configuration: config={{"group": {{"{name}": …}}}} gives group.{name}.'
        for name in factors.taken
    ]
    for name, others in factors.together.items():
        more = f" and {len(others) - n_shown} more" if len(others) > n_shown else ""
        sentences.append(
            f"Confounded with {name}, so that their effects cannot be separated: "
            f"{', '.join(others[:n_shown])}{more}."
        )
    return sentences


@dataclass(frozen=True)
class _Leaf:
    """The levels of a configuration leaf: there are thousands of pairs of leaves to compare.

    Attributes:
        codes: the index of each run's level in `texts`.
        texts: the levels.
        is_name: whether they are strings.
    """

    codes: np.ndarray
    texts: np.ndarray
    is_name: bool

    @staticmethod
    def of(values: pd.Series) -> "_Leaf":
        codes, texts = pd.factorize(levels_of(values).astype(object))
        return _Leaf(codes, np.asarray(texts, dtype=object), _is_name(values))

    def follows(self, other: "_Leaf", designs: np.ndarray) -> bool:
        """Whether its effect could not be separated from that of another leaf.

        Args:
            other: a leaf of the same runs.
            designs: the number of each run's design.
        """
        return self._is_fixed_by(other, designs) or self._is_copy_of(other)

    def _is_fixed_by(self, other: "_Leaf", designs: np.ndarray) -> bool:
        """Whether each level of `other` determines the level of the leaf, and not only because each
        has a single design."""
        n_both = len(_pairs(self.codes, other.codes))
        if n_both > len(other.texts):
            return False
        if n_both == len(self.texts):
            return True
        known = designs >= 0
        of_each = _pairs(other.codes[known], designs[known])[:, 0]
        n_designs = np.bincount(of_each, minlength=len(other.texts))
        return bool(n_designs.max() > 1 if other.is_name else n_designs.min() > 1)

    def _is_copy_of(self, other: "_Leaf") -> bool:
        """Whether the leaf and `other` split the runs that have the leaf in the same way, such as
        the learning rate of a part that only some optimizers have."""
        has = self.texts[self.codes] != level_text(None)
        own, its = self.codes[has], other.codes[has]
        n_both = len(_pairs(own, its))
        return n_both > 1 and n_both == len(np.unique(own)) == len(np.unique(its))


def _pairs(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The distinct pairs of two numbers, `[pairs, 2]`."""
    n = int(other.max(initial=0)) + 1
    return np.stack(np.divmod(np.unique(one * n + other), n), axis=1)


def _is_name(values: pd.Series) -> bool:
    if values.dtype != object:
        return pd.api.types.is_string_dtype(values.dtype)
    return all(isinstance(value, str) for value in values.dropna())


def level_text(value: object) -> str:
    """A configuration value as written on the command line: a string that would be read as
    something else is in quotes, so that `1` and `'1'` are different levels."""
    if value is None or value is pd.NA or value != value:
        return "not set"
    if isinstance(value, bool | np.bool_):
        return str(value).lower()
    if isinstance(value, float | np.floating):
        number = float(value)
        if not number.is_integer() or abs(number) >= 1e15:
            return f"{number:.10g}"  # with fewer digits, values that differ would be one level
        value = int(number)  # a whole number in a column with missing ones
    if isinstance(value, int | np.integer):
        return str(value)
    text = str(value)
    return f"'{text}'" if _READ_AS_ANOTHER.fullmatch(text) else text


def overrides(runs: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """These values of each run as overrides; values that are not set are omitted."""
    texts = [levels_of(runs[name]) for name in names]
    unset = level_text(None)
    return [
        " ".join(f"{name}={text}" for name, text in zip(names, row, strict=True) if text != unset)
        for row in (zip(*texts, strict=True) if names else [()] * len(runs))
    ]


def ordered_levels(values: pd.Series) -> list[Any]:
    """The distinct values of a factor: sorted numbers, then strings, then None if it is not set."""
    levels = values.astype(object).where(values.notna(), None)
    if values.dtype == object:  # true and 1 are different levels
        return sorted({level_text(level): level for level in levels}.values(), key=_rank)
    return sorted(pd.unique(levels), key=_rank)


def _rank(level: Any) -> tuple[int, float, str]:
    if level is None:
        return 2, 0.0, ""
    return (0, float(as_number(level)), "") if is_number(level) else (1, 0.0, str(level))


def is_number(level: Any) -> bool:
    """Whether a level is a number or a fraction such as `8/3`, as a width may be written."""
    level = as_number(level)
    return isinstance(level, int | float | np.number) and not isinstance(level, bool | np.bool_)


def as_number(level: Any) -> Any:
    """Converts a fraction such as `8/3` to a number; returns anything else unchanged."""
    if isinstance(level, str) and re.fullmatch(r"\d+/[1-9]\d*", level):
        return float(Fraction(level))
    return level
