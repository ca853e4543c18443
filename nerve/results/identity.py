"""Names of runs: `config_id` says what was run, `run_id` which time it was run."""

import hashlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

EXCLUDED = (
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


def config_id(config: Mapping[str, Any]) -> str:
    """Twelve hex digits that are equal for configurations that define the same result.

    The hash (SHA-256) of the canonical JSON of `config` without the `EXCLUDED` keys. Neither the
    order of keys nor writing 1 as 1.0 changes it; `true` and 1, or `"1"` and 1, are different.
    """
    text = json.dumps(_canonical(config, ""), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The dotted keys that count for `config_id` and differ, in the order of their names."""
    mine, its = _leaves(_canonical(config, ""), ""), _leaves(_canonical(other, ""), "")
    return sorted(key for key in mine | its if mine.get(key, ...) != its.get(key, ...))


def new_run_id() -> str:
    """Eight hex digits from the system's randomness, so that no seed can make two runs one."""
    return secrets.token_hex(4)


def _canonical(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        entries = ((str(key), f"{path}.{key}".lstrip("."), item) for key, item in value.items())
        return {
            key: _canonical(item, dotted) for key, dotted, item in entries if dotted not in EXCLUDED
        }
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_canonical(item, path) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return {"float": str(value)}  # JSON has no infinity, and the string "inf" is another
        return int(value) if value.is_integer() else value
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def _leaves(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= _leaves(item, f"{path}.{key}".lstrip("."))
    return leaves
