"""Ids of runs: `config_id` identifies the configuration, `run_id` the individual run."""

import hashlib
import json
import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

EXCLUDED = (
    "check",
    "checkpoint",
    "hydra",
    "logger",
    "objective",
    "resume",
    "retry",
    "threads",
    "data.cache_dir",
    "trainer.default_root_dir",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.logger",
)
"""Dotted keys of nerve-run, including all keys below them, that affect where or how fast a run
executes, but not its result. They are ignored in any configuration, even if nerve-run did not write
it."""

ADDED: dict[str, Any] = {
    "data.corpus.separator": None,
    "data.images.reversed": False,
    "data.separator_token": None,
    "data.tokenizer_sample_bytes": 1_000_000_000,
    "model.pre_std": None,
    "monitor.groups": [],
    "monitor.groups_every": 1,
    "monitor.sites": [],
    "monitor.skip_first": 0,
    "monitor.steps": None,
    "regularizer": {"name": "none"},
}
"""Dotted keys that were added to nerve-run after version 0.1.0, each with the value that
corresponds to the earlier behavior. A key with that value, and all keys below it, is ignored, so
that earlier runs keep their ids. A key without such a value must not be listed here: it makes
earlier runs different ones."""

GROUPS = ("model", "normalization", "activation", "ffn", "optimizer", "data", "monitor", "trainer")
"""Keys that every configuration of nerve-run has had since the first version."""

BESIDE: dict[str, tuple[str, str | None]] = {
    "data.corpus.separator": ("paths", None),
    "data.images.reversed": ("_target_", "digits"),
    "data.separator_token": ("vocab_size", None),
    "data.tokenizer_sample_bytes": ("vocab_size", None),
}
"""Keys of `ADDED` that apply only to some data sets, each with a key of the same group by which
these are recognized: by its presence, or by its value (for a `_target_`, the last name)."""

NON_FINITE = {str(number): number for number in (math.inf, -math.inf, math.nan)}


def config_id(config: Mapping[str, Any]) -> str:
    """Twelve hex digits that are equal for configurations that define the same result.

    The SHA-256 hash of the canonical JSON of `config` without the `EXCLUDED` keys and without the
    `ADDED` keys that change nothing. Only the last name of a `_target_` counts, not its module.
    Neither the order of keys nor writing 1 as 1.0 changes the hash; `true` and 1, or `"1"` and 1,
    are different. It stays the same when a configuration is written to run.json and read again.
    """
    return ids_of_plain(to_json(config))[0]


def ids_of_plain(config: Mapping[str, Any]) -> tuple[str, str]:
    """`config_id`, and the same hash without the seed, which is equal for runs that differ only in
    their seeds.

    Args:
        config: contains only JSON values and numbers, as returned by `RunRecord.load` and
            `to_json`.
    """
    entries = {key: _known_entry(key, config[key]) for key in sorted(config)}
    counted = [entry for entry in entries.values() if entry]
    unseeded = [entry for key, entry in entries.items() if entry and key != "seed"]
    return _digest(counted), _digest(unseeded)


def differences(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The dotted keys that enter `config_id` and differ, sorted by name."""
    mine, its = (_leaves(_canonical(to_json(each), ""), "") for each in (config, other))
    return sorted(key for key in mine | its if mine.get(key) != its.get(key))


def completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration of nerve-run, completed with the keys of `ADDED` that it is too old to have.

    Keys below `data` are only added for the data sets to which they apply, according to `BESIDE`. A
    configuration that nerve-run did not write is returned unchanged.
    """
    if not all(isinstance(config.get(group), Mapping) for group in GROUPS):
        return config
    result = dict(config)
    for dotted, value in ADDED.items():
        *groups, key = dotted.split(".")
        if dotted not in BESIDE or _has(_at(config, groups), *BESIDE[dotted]):
            _put(result, groups, key, value)
    return result


def new_run_id() -> str:
    """16 hex digits from the system's randomness, so that equal seeds never give equal ids."""
    return secrets.token_hex(8)


def to_json(
    value: Any, non_finite: Callable[[float], Any] = lambda number: {"float": str(number)}
) -> Any:
    """`value` as JSON can represent it; `from_json` is the inverse.

    NumPy and tensor scalars become numbers; paths and other objects become text.

    Args:
        value: any value of a configuration or a record.
        non_finite: replaces NaN and infinities, which JSON does not have.
    """
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:  # the most frequent cases
        return value
    if kind is dict:
        return {str(key): to_json(item, non_finite) for key, item in value.items()}
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): to_json(item, non_finite) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [to_json(item, non_finite) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else non_finite(value)
    return value if isinstance(value, bool | int | str) else str(value)


def from_json(value: Any) -> Any:
    """The inverse of `to_json`: `{"float": "inf"}` becomes infinity again."""
    if isinstance(value, dict):
        if is_non_finite(value):
            return NON_FINITE[value["float"]]
        return {key: from_json(item) for key, item in value.items()}
    return [from_json(item) for item in value] if isinstance(value, list) else value


def is_non_finite(value: Any) -> bool:
    """Whether `value` is how `to_json` represents NaN or an infinity."""
    if not isinstance(value, Mapping):
        return False
    name = value.get("float")
    return len(value) == 1 and isinstance(name, str) and name in NON_FINITE


def _canonical(value: Any, path: str) -> Any:
    """The part of the JSON `value` at the dotted key `path` that enters the hash."""
    if isinstance(value, dict):
        counted = {}
        for key, item in value.items():
            dotted = f"{path}.{key}" if path else key
            if dotted in EXCLUDED:
                continue
            canonical = _canonical(item, dotted)
            if dotted in ADDED and _text(canonical) == _text(_canonical(ADDED[dotted], dotted)):
                continue
            is_target = key == "_target_" and isinstance(item, str)
            counted[key] = _name(item) if is_target else canonical
        return counted
    if isinstance(value, list):
        return [_canonical(item, path) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _at(config: Mapping[str, Any], groups: Iterable[str]) -> Mapping[str, Any]:
    """The mapping at nested keys; empty if one of them is missing."""
    for group in groups:
        found = config.get(group)
        config = found if isinstance(found, Mapping) else {}
    return config


def _has(group: Mapping[str, Any], key: str, value: str | None) -> bool:
    """Whether a group has a key, with this value if one is given."""
    return key in group and value in (None, _name(str(group[key])))


def _put(config: dict[str, Any], groups: Iterable[str], key: str, value: Any) -> None:
    """Sets a missing nested key to a copy of `value`, and copies the mappings that it changes."""
    for group in groups:
        config[group] = dict(config[group])
        config = config[group]
    if key not in config:
        config[key] = deepcopy(value)


def _digest(entries: Iterable[str]) -> str:
    """The hash of a JSON object with these entries."""
    return hashlib.sha256(f"{{{','.join(entries)}}}".encode()).hexdigest()[:12]


_KNOWN: dict[tuple[str, str], str] = {}
"""A cache of entries by key and `repr` of the value: in ten thousand runs, most groups repeat."""
_MOST_KNOWN = 4096


def _known_entry(key: str, value: Any) -> str:
    """The canonical JSON of a top-level key of a configuration and its value; empty if the key does
    not enter the hash."""
    name = key, repr(value)
    entry = _KNOWN.get(name)
    if entry is None:
        canonical = _canonical(to_json({key: value}), "")
        entry = _text(canonical)[1:-1]
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[name] = entry
    return entry


def _name(target: str) -> str:
    """A class or function without its module: `models.gpt.GPT.from_preset` → `GPT.from_preset`."""
    parts = target.split(".")
    first = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    return ".".join(parts[first:])


def _text(canonical: Any) -> str:
    """Canonical JSON, in which true and 1 are different, as in the hash."""
    return json.dumps(canonical, sort_keys=True, separators=(",", ":"))


def _leaves(value: Any, path: str) -> dict[str, str]:
    """The canonical JSON of each leaf, by dotted key."""
    if not isinstance(value, Mapping) or not value or is_non_finite(value):
        return {path: _text(value)}
    leaves: dict[str, str] = {}
    for key, item in value.items():
        leaves |= _leaves(item, f"{path}.{key}".lstrip("."))
    return leaves
