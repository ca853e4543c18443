"""What Hydra saved beside a run, read as files of which anything may have become."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]  # what OmegaConf raises

from nerve.errors import StoreError


def load_saved(path: Path, kind: type) -> Any:
    """The plain content of `.hydra/<name>.yaml`, its interpolations as such.

    Args:
        path: of the file.
        kind: `dict` or `list`.

    Raises:
        StoreError: for a file that cannot be read, or holds something else.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
        if isinstance(content, kind) and (content or kind is list):
            return content
        error: Exception = TypeError(f"it holds {content!r:.100}, not a {kind.__name__} of values")
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as refused:
        error = refused
    raise StoreError(
        f"{path} is not what Hydra saves of a run: {' '.join(str(error).split())}. Restore it; "
        "run.json beside it has the values, too."
    ) from error
