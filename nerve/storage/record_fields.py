"""The types of the fields of `run.json`, checked when a record is read or written."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from nerve.errors import StoreError
from nerve.storage.json_values import is_non_finite, to_json

RUN_STATUSES = ("running", "done", "failed", "interrupted")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float) or is_non_finite(value)


def _is_time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


KINDS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (f"one of {', '.join(RUN_STATUSES)}", RUN_STATUSES.__contains__, ("run_status",)),
    (
        "a nonempty string",
        _is_text,
        ("run_id", "sweep", "git_commit", "host", "device", "wandb_id"),
    ),
    (
        "a string",
        lambda value: isinstance(value, str),
        ("separator_token", "stopped_by", "warning"),
    ),
    ("an ISO 8601 time with a time zone", _is_time, ("started", "heartbeat", "advanced", "ended")),
    (
        "a whole number",
        lambda value: isinstance(value, int) and not isinstance(value, bool),
        ("restarts", "step", "seed", "n_parameters"),
    ),
    ("a number", _is_number, ("unigram_loss",)),
    ("a mapping", _is_mapping, ("config", "fingerprints", "pre_scales", "versions", "job")),
    (
        "a mapping of numbers",
        lambda value: _is_mapping(value) and all(map(_is_number, value.values())),
        ("final",),
    ),
    (
        "a mapping with type and message, both strings",
        lambda value: (
            _is_mapping(value) and bool(value) and all(isinstance(v, str) for v in value.values())
        ),
        ("error",),
    ),
)
"""The type of each field's JSON value; the fields in `OPTIONAL` may be None."""

OPTIONAL = (
    *("sweep", "git_commit", "host", "device", "advanced", "ended", "seed", "n_parameters"),
    *("unigram_loss", "job", "error", "wandb_id"),
    *("separator_token", "stopped_by", "warning"),
)


_AS_IN_JSON = (str, int, dict, type(None))


def check_fields(values: Mapping[str, Any]) -> None:
    """Raises `StoreError`, with the name of the field, for a value whose JSON form does not have
    the type of its field."""
    for kind, holds, names in KINDS:
        for name in names:
            value = values[name]
            value = value if isinstance(value, _AS_IN_JSON) else to_json(value)
            if not holds(value) and (value is not None or name not in OPTIONAL):
                raise StoreError(f"{name} of a run record must be {kind}; got {value!r:.200}.")
