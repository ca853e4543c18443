"""Reads what Hydra saved with a run; the files may have been damaged or edited."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nerve.errors import StoreError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times faster if libyaml is available."""


def load_saved(path: Path) -> dict[str, Any]:
    """The plain content of `.hydra/config.yaml` and similar files, with interpolations kept.

    Raises:
        StoreError: for a file that cannot be read, or contains something else.
    """
    content = _read(path, lambda: OmegaConf.to_container(OmegaConf.load(path)), dict)
    if not content:
        raise _not_saved(path, TypeError("it is empty"))
    return {str(key): value for key, value in content.items()}


def load_overrides(path: Path) -> list[str]:
    """The strings in `.hydra/overrides.yaml`. Raises as `load_saved` does."""
    return [str(text) for text in _read(path, lambda: _loaded(path.read_bytes()), list)]


def _loaded(data: bytes) -> Any:
    try:
        return yaml.load(data, _LOADER)
    except YAMLError:  # libyaml refuses the name of a file whose bytes are not valid UTF-8
        return yaml.load(data, yaml.SafeLoader)


def _read(path: Path, read: Callable[[], Any], kind: type) -> Any:
    try:
        content = read()
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise _not_saved(path, error) from error
    if not isinstance(content, kind):
        raise _not_saved(path, TypeError(f"it contains {content!r:.100}, not a {kind.__name__}"))
    return content


def _not_saved(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"{path} is not a configuration saved by Hydra: {' '.join(str(error).split())}. Restore "
        "it; run.json in the run directory has the values, too."
    )
