"""Names of runs: `config_id` says what was run, `run_id` which time it was run."""

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
"""Dotted keys of nerve-run, each with all below it, that change where or how fast a run goes, not
its result. They are passed over in any configuration, also in one that nerve-run did not write."""

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
"""Dotted keys that nerve-run got after version 0.1.0, each with the value that means what was done
before. A key with that value, and all below it, is passed over: runs of before keep their ids. A
key of which no value means that has no place here, and runs of before are other runs."""

GROUPS = ("model", "normalization", "activation", "ffn", "optimizer", "data", "monitor", "trainer")
"""Keys that every configuration of nerve-run has had from its first version on."""

BESIDE: dict[str, tuple[str, str | None]] = {
    "data.corpus.separator": ("paths", None),
    "data.images.reversed": ("_target_", "digits"),
    "data.separator_token": ("vocab_size", None),
    "data.tokenizer_sample_bytes": ("vocab_size", None),
}
"""Keys of `ADDED` that concern some data sets, each with a key of the same group that only these
have, or have with that value; of a `_target_` its last name."""

NON_FINITE = {str(number): number for number in (math.inf, -math.inf, math.nan)}


def config_id(config: Mapping[str, Any]) -> str:
    """Twelve hex digits that are equal for configurations that define the same result.

    The hash (SHA-256) of the canonical JSON of `config` without the `EXCLUDED` keys and without the
    `ADDED` ones that change nothing. Of a `_target_` the last name counts, not the module that it
    is in. Neither the order of keys nor writing 1 as 1.0 changes it; `true` and 1, or `"1"` and 1,
    are different. A configuration that was written to run.json and read again has the same.
    """
    return ids_of_plain(to_json(config))[0]


def ids_of_plain(config: Mapping[str, Any]) -> tuple[str, str]:
    """`config_id`, and the same without the seed, which runs that differ in nothing else share.

    Args:
        config: of the values of JSON and numbers alone, as `RunRecord.load` and `to_json` give it.
    """
    entries = {key: _known_entry(key, config[key]) for key in sorted(config)}
    counted = [entry for entry in entries.values() if entry]
    unseeded = [entry for key, entry in entries.items() if entry and key != "seed"]
    return _digest(counted), _digest(unseeded)


def differences(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The dotted keys that count for `config_id` and differ, in the order of their names."""
    mine, its = (_leaves(_canonical(to_json(each), ""), "") for each in (config, other))
    return sorted(key for key in mine | its if mine.get(key) != its.get(key))


def completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration of nerve-run with each key of `ADDED` that it is too old to have.

    Keys below `data` depend on the data set: they are added beside the keys of `BESIDE`. Any other
    configuration is returned as it is.
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
    """16 hex digits from the system's randomness, so that no seed can make two runs one."""
    return secrets.token_hex(8)


def to_json(
    value: Any, non_finite: Callable[[float], Any] = lambda number: {"float": str(number)}
) -> Any:
    """What JSON can hold of `value`; `from_json` makes the same of it again.

    NumPy and tensor scalars become numbers, paths and the like text.

    Args:
        value: any value of a configuration or a record.
        non_finite: what becomes of NaN and infinities, which JSON does not have.
    """
    kind = type(value)
    if (
        kind is str or kind is int or kind is bool or value is None
    ):  # most are, of ten thousand runs
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
    """`value` as it was before `to_json`: `{"float": "inf"}` is infinity again."""
    if isinstance(value, dict):
        if is_non_finite(value):
            return NON_FINITE[value["float"]]
        return {key: from_json(item) for key, item in value.items()}
    return [from_json(item) for item in value] if isinstance(value, list) else value


def is_non_finite(value: Any) -> bool:
    """Whether this is what `to_json` makes of NaN or an infinity."""
    if not isinstance(value, Mapping):
        return False
    name = value.get("float")
    return len(value) == 1 and isinstance(name, str) and name in NON_FINITE


def _canonical(value: Any, path: str) -> Any:
    """What counts of the JSON `value` at the dotted key `path`."""
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
    """What stands at nested keys; nothing where one of them is missing."""
    for group in groups:
        found = config.get(group)
        config = found if isinstance(found, Mapping) else {}
    return config


def _has(group: Mapping[str, Any], key: str, value: str | None) -> bool:
    """Whether a group has a key; where a value is given, with that value."""
    return key in group and value in (None, _name(str(group[key])))


def _put(config: dict[str, Any], groups: Iterable[str], key: str, value: Any) -> None:
    """Sets what is missing at nested keys, to a copy; the mappings that it changes are copies."""
    for group in groups:
        config[group] = dict(config[group])
        config = config[group]
    if key not in config:
        config[key] = deepcopy(value)


def _digest(entries: Iterable[str]) -> str:
    """Of a JSON object of these entries."""
    return hashlib.sha256(f"{{{','.join(entries)}}}".encode()).hexdigest()[:12]


_KNOWN: dict[tuple[str, str], str] = {}
"""Entries by key and `repr`, which tells plain values apart: of ten thousand runs most groups are
alike."""
_MOST_KNOWN = 4096


def _known_entry(key: str, value: Any) -> str:
    """The canonical JSON of a value at the top of a configuration, behind its key; empty if it does
    not count."""
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
    """A class or function without its module: `GPT.from_preset` of `models.gpt.GPT.from_preset`."""
    parts = target.split(".")
    first = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    return ".".join(parts[first:])


def _text(canonical: Any) -> str:
    """Canonical JSON, in which true and 1 are as different as they are in the hash."""
    return json.dumps(canonical, sort_keys=True, separators=(",", ":"))


def _leaves(value: Any, path: str) -> dict[str, str]:
    """The texts of what is canonical, by dotted key."""
    if not isinstance(value, Mapping) or not value or is_non_finite(value):
        return {path: _text(value)}
    leaves: dict[str, str] = {}
    for key, item in value.items():
        leaves |= _leaves(item, f"{path}.{key}".lstrip("."))
    return leaves
