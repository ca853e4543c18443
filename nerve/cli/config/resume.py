"""`nerve-run resume=<run directory>`: uses the saved configuration of a run instead of `config`."""

import os
from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from nerve.cli.config.compose import CONF
from nerve.cli.config.targets import resolve_targets
from nerve.cli.saved import load_saved
from nerve.config import pasted, require
from nerve.errors import StoreError
from nerve.storage.identity import ADDED, EXCLUDED

CONFIG_NAME = "resumed"
"""The primary config that `prepare_resume` stores where Hydra finds it."""


def prepare_resume(directory: Path, overrides: Sequence[Override], arguments: Sequence[str]) -> str:
    """The name of the primary config for a command line with `resume=…`.

    Args:
        directory: of the run.
        overrides: among the arguments.
        arguments: of the command line.

    Raises:
        ConfigError: for values besides `resume` that would make it a different run, or start a new
            one elsewhere.
        StoreError: if the directory holds no run.
    """
    defining = [
        str(override.input_line)
        for override in overrides
        if not override.is_hydra_override() and not _is_free(override.key_or_group)
    ]
    require(
        not defining,
        f"A resumed run keeps the settings that define its result; got {' '.join(defining)} with "
        f"{pasted('resume', directory)}. Leave it out, or start a new run; only {_free_keys()} may "
        "change.",
    )
    elsewhere = [
        str(override.input_line)
        for override in overrides
        if override.key_or_group in ("hydra.run", "hydra.run.dir")
        and os.path.abspath(str(override.value())) != os.path.abspath(directory)
    ]
    require(
        not elsewhere,
        f"A run is resumed in its own directory; got {' '.join(elsewhere)} with "
        f"{pasted('resume', directory)}, which would be a new run. Leave one of them out.",
    )
    named = any(
        argument.startswith(("--config-n", "-cn", "--m", "-m"))  # options may be shortened
        for argument in arguments
    )
    require(
        not named,
        f"resume takes a single run, with its own configuration; got {pasted('resume', directory)} "
        "with --multirun or --config-name. Leave that out; a sweep resumes its interrupted runs by "
        "itself.",
    )
    _store(directory, chooses_logger=any(o.key_or_group == "logger" for o in overrides))
    return CONFIG_NAME


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in EXCLUDED)


def _free_keys() -> str:
    keys = ("threads", "logger", "checkpoint", "retry")
    return ", ".join(key for key in keys if _is_free(key))


def _store(directory: Path, chooses_logger: bool) -> None:
    saved = directory / ".hydra" / "config.yaml"
    if not saved.is_file():
        raise StoreError(
            f"resume takes the directory of a run, which contains .hydra/config.yaml; {directory} "
            "does not. Pass the run directory that nerve-run printed."
        )
    stored = load_saved(saved)
    primary = OmegaConf.load(CONF / "config.yaml")
    assert isinstance(primary, DictConfig)
    # The nerve version of the run may lack keys that are free now or were added since.
    known = OmegaConf.create(
        {key: primary[key] for key in primary if _is_free(str(key)) and key != "hydra"}
    )
    for key, as_before in ADDED.items():
        if not key.startswith("data."):  # which only some data take, with this default
            OmegaConf.update(known, key, as_before, force_add=True)
    values = resolve_targets(OmegaConf.to_container(OmegaConf.merge(known, stored)))
    assert isinstance(values, dict)
    defaults = [entry for entry in primary.defaults if any("hydra/" in key for key in entry)]
    if chooses_logger:
        values.pop("logger", None)
        defaults.insert(0, {"logger": "csv"})  # overrides must come last
    hydra = OmegaConf.merge(primary.hydra, {"run": {"dir": str(directory)}})
    node = {"defaults": [*defaults, "_self_"], **values, "hydra": hydra}
    ConfigStore.instance().store(name=CONFIG_NAME, node=node)
