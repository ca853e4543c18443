"""Where checkpoints for transformers are: folders, .gguf files, names on the hub."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import Any

from nerve.config import require
from nerve.errors import DataError
from nerve.storage.identity import is_of_nerve_run

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")

_MEASURED_BY = {"probe": "nerve-probe", "measure": "nerve.measure"}
"""The key that each tool adds to the configuration of its runs."""


def expanded(models: Sequence[str]) -> list[str]:
    """The models, with each pattern replaced by its matches, sorted by name.

    Raises:
        ConfigError: for a pattern that matches nothing.
    """
    found: list[str] = []
    for model in models:
        if Path(model).exists() or not re.search(r"[*?\[]", model):
            found.append(model)
            continue
        matches = sorted(glob(model))
        require(bool(matches), f"A pattern must match checkpoints; {model!r} matches nothing here.")
        found += matches
    return found


def is_on_hub(place: str, rule: str = "A model is a folder, a run directory") -> bool:
    """Whether to look for a place on the hub; False if it exists here.

    Args:
        place: as typed.
        rule: the start of the error message, which says what else it may be.

    Raises:
        DataError: for what does not exist here and cannot be a name on the hub.
    """
    path = Path(place)
    if path.exists():
        return False
    is_name = _HUB_NAME.fullmatch(place) is not None
    if is_name and "/" in place and "@" not in place and path.parent.is_dir():
        raise DataError(
            f"{rule} or a name on the hub; the folder {path.parent} exists, and has no "
            f"{path.name}.{near_names(place)} Check the path; on the hub, use {place}@main."
        )
    if not is_name:
        raise DataError(
            f"{rule} or a name on the hub; there is no {place}.{near_names(place)} Check the path."
        )
    return True


def near_names(place: str) -> str:
    """A hint with names similar to the first missing part of a path, or nothing."""
    path = Path(place)
    while not path.parent.exists():
        path = path.parent
    try:
        names = [each.name for each in path.parent.iterdir()]
    except OSError:  # a file, or a folder that cannot be read
        return ""
    close = [str(path.parent / each) for each in get_close_matches(path.name, names)]
    return f" Similar names: {', '.join(close)}." if close else ""


def check_place(place: str) -> None:
    """Refuses what cannot be a model, before anything is loaded.

    Raises:
        DataError: saying what it is instead.
    """
    if is_on_hub(place):
        return
    path = Path(place)
    if path.is_file():
        if path.suffix == ".gguf":
            return
        raise DataError(
            f"A model is a folder that transformers reads, or a .gguf file; {place} is another "
            "file. Give the folder that save_pretrained wrote; a model of your own code is "
            "measured with nerve.measure (docs/own-model.md)."
        )
    gguf = sorted(path.glob("*.gguf"))
    if not (path / "config.json").is_file() and not gguf:
        within = sorted({each.parent.parent for each in path.glob("*/*/config.json")})
        within += [path] if any(path.glob("*/config.json")) else []
        hint = (
            f"Its checkpoints: '{within[-1]}/*'."
            if within
            else (
                "Check the path; a model of your own code is measured with nerve.measure "
                "(docs/own-model.md)."
            )
        )
        raise DataError(
            f"A model's folder holds config.json and weights, a run directory run.json; {place} "
            f"has neither. {hint}"
        )
    if not any(file for pattern in WEIGHTS for file in path.glob(pattern)):
        raise DataError(
            f"A model's folder holds its weights ({', '.join(WEIGHTS)}); {place} has config.json "
            "and no weights. Copy them there, or give the folder that save_pretrained wrote."
        )
    if len(gguf) > 1 and not (path / "config.json").is_file():
        raise DataError(
            f"A folder without config.json holds one .gguf file; {place} has {len(gguf)}. Give the "
            f"file itself, such as {gguf[0]}."
        )


def check_keeps_weights(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuses a run of a tool that measures but does not store weights.

    Args:
        directory: of the run.
        config: its configuration.

    Raises:
        DataError: naming the tool that wrote the run.
    """
    written = next((name for key, name in _MEASURED_BY.items() if key in config), None)
    if written is None and not is_of_nerve_run(config):
        written = "nerve.watch"
    if written is not None:
        raise DataError(
            f"nerve-probe takes a model's weights, or a run of nerve-run, which keeps them; "
            f"{directory} is a run of {written}, which has measurements but no weights. "
            f"Give the model itself; nerve-report {directory} shows the measurements."
        )


def arguments_of(place: str) -> tuple[str, dict[str, Any]]:
    """The arguments of transformers' `from_pretrained` for a model, its weights and its
    tokenizer."""
    path = Path(place)
    if path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        gguf = [] if (path / "config.json").is_file() else [*path.glob("*.gguf")]
        return str(path), {"gguf_file": gguf[0].name} if gguf else {}
    name, _, revision = place.partition("@")
    return name, {"revision": revision} if revision else {}


def name_of(places: Sequence[str]) -> str:
    """A short name for a series: for several folders, the name of their parent."""
    path = Path(places[0])
    if not path.exists():
        return places[0].partition("@")[0].split("/")[-1]
    path = path.resolve()
    return (path.parent if len(places) > 1 else path).name.removesuffix(".gguf") or "model"
