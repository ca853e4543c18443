"""The arguments of `nerve.measure` and of the monitors that are about the run in which they store:
what is checked, and what the run records of them."""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from nerve.config import require, require_count, require_several
from nerve.measuring.ffns import FFN
from nerve.measuring.given import require_mapping
from nerve.measuring.masks import Masks
from nerve.recording.digest import Digest
from nerve.recording.measured_run import OWN
from nerve.recording.settings import MonitorSettings
from nerve.sites_and_groups import AROUND, GROUPINGS
from nerve.storage.record import RunRecord
from nerve.storage.schema import METRICS_SCHEMA


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
    require_mapping("fingerprints", fingerprints)
    labels, given = labels or {}, [*(labels or {}), *(fingerprints or {})]
    require(
        into is not None or not given,
        f"labels and fingerprints are stored with a run; got {', '.join(given)} without into=. "
        "Give into=, or leave them out.",
    )
    recorded = {field.name for field in fields(RunRecord)} - {"seed"}
    taken = sorted(labels.keys() & {*OWN, *METRICS_SCHEMA.names, *recorded})
    require(
        not taken,
        f"labels must not have the names {', '.join(OWN)}, those of columns of nerve.load_metrics, "
        f"or those of what each run records (host, device, …), which nerve.load_runs would show in "
        f"their place; got {', '.join(taken)}. Choose another name, or nest it: "
        f"labels={{'group': {{'{taken[0] if taken else ''}': …}}}}.",
    )


def recorded_arguments(
    *,
    exclude: Collection[int],
    only_labeled: bool,
    ffns: Iterable[FFN] | None,
    token_counts: Tensor | None,
) -> dict[str, Any]:
    """Arguments that change what is measured, as the configuration of a run records them: of `ffns`
    their layers and names, of `token_counts` a digest. What is None has no entry.

    Args:
        token_counts: those of groups by frequency that the caller gave.
        others: as in `nerve.measure`.
    """
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
    config: Mapping[str, Any] | None,
    settings: MonitorSettings,
    *,
    mask: Callable[[Any], Masks] | None,
    exclude: Collection[int],
    only_labeled: bool,
    ffns: Sequence[FFN] | None,
    token_counts: Tensor | None,
) -> dict[str, Any]:
    """The configuration of a run that a monitor records for its user: the user's own, and how it is
    measured as `monitor`.

    Args:
        config: the user's.
        settings: those of the monitor.
        others: as in `nerve.watch`.

    Raises:
        ConfigError: if `config` is not a mapping by name, or has a `monitor`.
    """
    require_mapping("config", config)
    config = dict(config or {})
    require(
        "monitor" not in config,
        "monitor is reserved for the measurement settings, which are added to config= "
        "automatically; got a value for it. Choose another name.",
    )
    arguments = recorded_arguments(
        exclude=exclude,
        only_labeled=only_labeled,
        ffns=ffns,
        token_counts=token_counts if "frequency" in settings.groups else None,
    )
    masked = {} if mask is None else {"mask": True}
    return {**config, "monitor": asdict(settings) | arguments | masked}
