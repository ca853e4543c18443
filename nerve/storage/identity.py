"""Ids of runs: `config_id` identifies the configuration, `run_id` the individual run."""

import hashlib
import marshal
import secrets
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from nerve.storage.json_values import canonical_json, is_non_finite, to_json

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
executes, but not its result. In a configuration that nerve-run did not write, such as one given to
`nerve.watch`, the same names may mean something else, so there they count."""

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
earlier runs different ones. In a configuration that nerve-run did not write, only the keys of
`monitor` are ignored: `nerve.watch` and `nerve.SpectralCallback` record the same settings there."""

ORIGINAL_GROUPS = (
    "model",
    "normalization",
    "activation",
    "ffn",
    "optimizer",
    "data",
    "monitor",
    "trainer",
)
"""Keys that every configuration of nerve-run has had since the first version."""

BESIDE: dict[str, tuple[str, str | None]] = {
    "data.corpus.separator": ("paths", None),
    "data.images.reversed": ("_target_", "digits"),
    "data.separator_token": ("vocab_size", None),
    "data.tokenizer_sample_bytes": ("vocab_size", None),
}
"""Keys of `ADDED` that apply only to some data sets, each with a key of the same group by which
these are recognized: by its presence, or by its value (for a `_target_`, the last name)."""

_MAPPINGS = (dict, Mapping)  # a dict is recognized much faster than another mapping
_ADDED_KEYS = [key for key in ADDED if "." not in key]


def config_id(config: Mapping[str, Any]) -> str:
    """Twelve hex digits that are equal for configurations that define the same result.

    The SHA-256 hash of the canonical JSON of `config` without what says nothing about the result:
    the `EXCLUDED` keys of nerve-run, and `ADDED` keys with their earlier value. Only the last name
    of a `_target_` counts, not its module.
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
    return Canonical.of(config).ids()


class Canonical(NamedTuple):
    """Canonical JSON of the top-level keys of a configuration with their values, in order.

    Args:
        texts: of all keys.
        entries: of those that enter the hash.
        unseeded: of these without the seed.
    """

    texts: list[str]
    entries: list[str]
    unseeded: list[str]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Canonical":
        """That of a configuration of JSON values and numbers."""
        found, is_ours = cls([], [], []), is_of_nerve_run(config)
        for key in sorted(config):
            text, entry = _known(key, config[key], is_ours)
            found.texts.append(text)
            if entry:
                found.entries.append(entry)
                if key != "seed":
                    found.unseeded.append(entry)
        return found

    @property
    def text(self) -> str:
        """The canonical JSON of the whole configuration."""
        return f"{{{','.join(self.texts)}}}"

    def ids(self) -> tuple[str, str]:
        """As `ids_of_plain`."""
        return _digest(self.entries), _digest(self.unseeded)


def differences(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The dotted keys that enter `config_id` and differ, sorted by name."""
    mine, its = (
        _leaves(_canonical(to_json(each), "", is_of_nerve_run(each)), "")
        for each in (config, other)
    )
    return sorted(key for key in mine | its if mine.get(key) != its.get(key))


def is_of_nerve_run(config: Mapping[str, Any]) -> bool:
    """Whether nerve-run wrote a configuration."""
    return all(isinstance(config.get(group), _MAPPINGS) for group in ORIGINAL_GROUPS)


def completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration of nerve-run, completed with the keys of `ADDED` that it is too old to have.

    Keys below `data` are only added for the data sets to which they apply, according to `BESIDE`. A
    configuration that nerve-run did not write is returned unchanged.
    """
    if not is_of_nerve_run(config):
        return config
    return {key: completed_key(config, key) for key in completed_keys(config)}


def completed_keys(config: Mapping[str, Any]) -> list[str]:
    """The top-level keys of a configuration of nerve-run once it is completed, in order."""
    return [*config, *(key for key in _ADDED_KEYS if key not in config)]


def completed_key(config: Mapping[str, Any], key: str) -> Any:
    """The value of a top-level key of a configuration of nerve-run once it is completed. Apart from
    `key`, it depends only on the value before."""
    result = {key: config[key]} if key in config else {}
    for dotted, value in ADDED.items():
        *groups, last = dotted.split(".")
        if key != (groups or [last])[0]:
            continue
        group = _at(result, groups)
        if last not in group and (dotted not in BESIDE or _has(group, *BESIDE[dotted])):
            result = _with(result, groups, last, value)
    return result[key]


def new_run_id() -> str:
    """16 hex digits from the system's randomness, so that equal seeds never give equal ids."""
    return secrets.token_hex(8)


def _canonical(value: Any, path: str, is_ours: bool) -> Any:
    """The part of the JSON `value` at the dotted key `path` that enters the hash; `is_ours` says
    whether nerve-run wrote the configuration."""
    if isinstance(value, dict):
        counted = {}
        for key, item in value.items():
            dotted = f"{path}.{key}" if path else key
            if is_ours and dotted in EXCLUDED:
                continue
            canonical = _canonical(item, dotted, is_ours)
            if (is_ours or path == "monitor") and _is_as_before(dotted, canonical):
                continue
            is_target = key == "_target_" and isinstance(item, str)
            counted[key] = _name(item) if is_target else canonical
        return counted
    if isinstance(value, list):
        return [_canonical(item, path, is_ours) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_as_before(dotted: str, canonical: Any) -> bool:
    """Whether this is a key of `ADDED` with the value that corresponds to the earlier behavior."""
    if dotted not in ADDED:
        return False
    before = _canonical(ADDED[dotted], dotted, is_ours=True)
    return canonical_json(canonical) == canonical_json(before)


def _at(config: Mapping[str, Any], groups: Iterable[str]) -> Mapping[str, Any]:
    """The mapping at nested keys; empty if one of them is missing."""
    for group in groups:
        found = config.get(group)
        config = found if isinstance(found, _MAPPINGS) else {}
    return config


def _has(group: Mapping[str, Any], key: str, value: str | None) -> bool:
    """Whether a group has a key, with this value if one is given."""
    return key in group and value in (None, _name(str(group[key])))


def _with(config: Mapping[str, Any], groups: Sequence[str], key: str, value: Any) -> dict[str, Any]:
    """The configuration with a copy of `value` at a nested key."""
    if not groups:
        return {**config, key: deepcopy(value)}
    return {**config, groups[0]: _with(config[groups[0]], groups[1:], key, value)}


def _digest(entries: Iterable[str]) -> str:
    """The hash of a JSON object with these entries."""
    return hashlib.sha256(f"{{{','.join(entries)}}}".encode()).hexdigest()[:12]


_KNOWN: dict[tuple[str, bytes | str, bool], tuple[str, str]] = {}
"""A cache by key and content: in ten thousand runs, most groups repeat."""
_MOST_KNOWN = 4096


def _known(key: str, value: Any, is_ours: bool) -> tuple[str, str]:
    """The canonical JSON of a top-level key of a configuration and its value, and that which enters
    the hash; the latter is empty if the key does not enter it. `is_ours` says whether nerve-run
    wrote the configuration."""
    name = key, content_of(value), is_ours
    known = _KNOWN.get(name)
    if known is None:
        canonical = _canonical(to_json({key: value}), "", is_ours)
        known = canonical_json({key: value})[1:-1], canonical_json(canonical)[1:-1]
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[name] = known
    return known


def content_of(value: Any) -> bytes | str:
    """A key for caches that is only equal for values of equal types and contents."""
    try:
        return marshal.dumps(value, 2)
    except ValueError:  # such as a member of an enumeration
        return repr(value)


def _name(target: str) -> str:
    """A class or function without its module: `models.gpt.GPT.from_preset` → `GPT.from_preset`."""
    parts = target.split(".")
    first = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    return ".".join(parts[first:])


def _leaves(value: Any, path: str) -> dict[str, str]:
    """The canonical JSON of each leaf, by dotted key."""
    if not isinstance(value, Mapping) or not value or is_non_finite(value):
        return {path: canonical_json(value)}
    leaves: dict[str, str] = {}
    for key, item in value.items():
        leaves |= _leaves(item, f"{path}.{key}".lstrip("."))
    return leaves
