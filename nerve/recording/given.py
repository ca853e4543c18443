"""The arguments of `nerve.measure` and of the monitors that are about the run in which they store:
what is checked, and what the run records of them."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from nerve.config import require, require_choice, require_count, require_several
from nerve.measuring.ffns import FFN
from nerve.measuring.given import require_mapping, told
from nerve.measuring.masks import Masks
from nerve.recording.digest import Digest
from nerve.recording.measured_run import OWN
from nerve.recording.settings import MonitorSettings
from nerve.sites_and_groups import AROUND, GROUPINGS
from nerve.storage.directory import RunDirectory
from nerve.storage.schema import METRIC_COLUMNS

_FINGERPRINTS = ("corpus", "tokenizer", "heldout")
"""What a run may have fingerprints of."""


def check_stored(
    into: str | os.PathLike[str] | None,
    step: int,
    spectra: bool | str,
    resume: bool,
    groups: Sequence[str],
    sites: Sequence[str],
    *,
    is_series: bool,
) -> None:
    """Checks the arguments for storing, and that there is a run for them.

    Raises:
        ConfigError: for a value that is out of range, or that only a run takes.
    """
    require_count("step", step, least=0)
    require(
        step == 0 or (into is not None and not is_series),
        f"step= is the step of a single model that is stored with into=; got step={step} "
        f"{'and a series, which has its own' if is_series else 'without into='}. Leave it out.",
    )
    require(
        spectra in (True, False, "auto"), f"spectra must be true, false or 'auto'; got {spectra!r}."
    )
    require(
        spectra is True or into is not None,
        f"spectra= says which eigenvalues are stored with into=; got {spectra!r} without into=. "
        "Leave it out.",
    )
    require(not resume or into is not None, "resume=True continues the run in into=; got none.")
    for name, each, options in (("groups", groups, GROUPINGS), ("sites", sites, AROUND)):
        require_several(name, each, options)
    require(
        into is not None or not (groups or sites),
        "Groups and sites need a run to be stored in, for nerve.load_groups; got none. Give into=.",
    )


def check_labels(
    into: str | os.PathLike[str] | None,
    labels: Mapping[str, Any] | None,
    fingerprints: Mapping[str, str] | None,
) -> None:
    """Checks what is stored next to the measurements.

    Raises:
        ConfigError: for what is no mapping by name or has no run, and for a label whose name is
            reserved.
    """
    require_mapping("labels", labels)
    check_fingerprints(fingerprints)
    given = [*(labels or {}), *(fingerprints or {})]
    require(
        into is not None or not given,
        f"labels and fingerprints are stored with a run; got {', '.join(given)} without into=. "
        "Give into=, or leave them out.",
    )
    _check_names("labels", labels or {}, OWN)


def check_fingerprints(fingerprints: Mapping[str, str] | None) -> None:
    """Raises `ConfigError` unless these are texts by the name of the data that they identify."""
    require_mapping("fingerprints", fingerprints)
    for name, text in (fingerprints or {}).items():
        require_choice("a name of fingerprints", name, _FINGERPRINTS)
        require(
            isinstance(text, str) and text != "",
            f"A fingerprint must be a hash, or another text that identifies the data; got {name}="
            f"{told(text)}.",
        )


def check_token_counts(
    groups: Collection[str], token_counts: Tensor | None, *, are_counted: bool
) -> None:
    """Checks that groups by frequency have the counts that they need.

    Args:
        groups: the groupings of the samples.
        token_counts: as in `nerve.measure`.
        are_counted: whether there are batches whose tokens are counted without them.

    Raises:
        ConfigError: without counts that are needed, and for counts that are not used.
    """
    by_frequency = "frequency" in groups
    require(
        token_counts is not None or are_counted or not by_frequency,
        "Groups by frequency need token_counts, the number of occurrences of each token id in the "
        "training text; got none. Give token_counts=, or leave frequency out of groups.",
    )
    require(
        token_counts is None or by_frequency,
        "token_counts= is for groups by frequency; groups= has no frequency. Add it, or leave "
        "token_counts out.",
    )


def _check_names(
    key: str,
    values: Mapping[str, Any],
    own: Collection[str],
    directory: str | os.PathLike[str] | None = None,
) -> None:
    """Checks the names of values that distinguish runs.

    Args:
        key: the name of the argument, for messages.
        values: the values. A mapping is a group, whose values have its name as a prefix.
        own: the names that the run itself needs.
        directory: a run there may have been stored with any other name, and can go on with it.

    Raises:
        ConfigError: for a name that is taken.
    """
    taken = [name for name in values if name in own]
    columns = [
        name
        for name, value in values.items()
        if name in METRIC_COLUMNS and name not in own and not isinstance(value, Mapping)
    ]
    if columns and directory is not None:
        record = RunDirectory(directory).record
        columns = [name for name in columns if record is None or name not in record.config]
    taken = sorted([*taken, *columns])
    require(
        not taken,
        f"{key} must not have the names {', '.join(own)}, which the run itself uses, or those of "
        f"columns of nerve.load_metrics, which cannot be factors; got {', '.join(taken)}. Choose "
        f"another name, or nest it: {key}={{'group': {{'{taken[0] if taken else ''}': …}}}}.",
    )


def recorded_arguments(
    *,
    exclude: Collection[int],
    only_labeled: bool,
    ffns: Iterable[FFN] | None,
    token_counts: Tensor | None,
) -> dict[str, Any]:
    """Arguments that change what is measured, as the configuration of a run records them: of `ffns`
    their layers and names, of `token_counts` a digest. What is None has no entry. The arguments are
    those of `nerve.measure`."""
    recorded: dict[str, Any] = {
        "exclude": sorted({int(each) for each in exclude}),
        "only_labeled": only_labeled,
    }
    if ffns is not None:
        recorded["ffns"] = sorted([int(ffn.layer), ffn.name] for ffn in ffns)
    if token_counts is not None:
        digest = Digest()
        digest.add([token_counts])
        recorded["token_counts"] = str(digest)
    return recorded


def watched_config(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any] | None,
    settings: MonitorSettings,
    *,
    fingerprints: Mapping[str, str] | None,
    mask: Callable[[Any], Masks] | None,
    exclude: Collection[int],
    only_labeled: bool,
    ffns: Sequence[FFN] | None,
    token_counts: Tensor | None,
) -> dict[str, Any]:
    """The configuration of a run that a monitor records for its user: the user's own, how it is
    measured as `monitor`, and the fingerprints, if any, as `text`.

    Args:
        directory: of the run.
        config: the user's.
        settings: those of the monitor.
        others: as in `nerve.watch`.

    Raises:
        ConfigError: if `config` is not a mapping by name, or has a name that is taken, and for
            fingerprints of the wrong kind.
    """
    require_mapping("config", config)
    check_fingerprints(fingerprints)
    text = {"text": dict(fingerprints)} if fingerprints else {}
    _check_names("config", config or {}, ["monitor", *text], directory)
    arguments = recorded_arguments(
        exclude=exclude, only_labeled=only_labeled, ffns=ffns, token_counts=token_counts
    )
    masked = {} if mask is None else {"mask": True}
    return {**(config or {}), **text, "monitor": asdict(settings) | arguments | masked}
