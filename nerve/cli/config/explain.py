"""Explains why a command line cannot be composed, for users who need not know Hydra."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nerve.cli.config.compose import CONF, SWEEPS
from nerve.config import pasted
from nerve.errors import NerveError, first_line


def explain_error(error: Exception) -> str:
    """Explains an error of Hydra or OmegaConf, for users who need not know either."""
    text = str(error)
    if found := re.match(r"Could not override '([^']+)'", text):
        key, known = found[1], known_keys()
        if key not in known:
            return f"There is no value {key!r}.{meant(key, known)}"
        if known[key]:
            return f"The selected options have no value {key!r}; it belongs to {known[key]}."
    if found := re.match(r"Multiple values for ([^.]+)\.", text):
        return f"{found[1]} has an option already; choose another with {found[1]}=…, without +."
    if found := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        return (
            f"A run has one value for each key; got {found[1]}={found[2]}. To run every "
            f'combination, use nerve-run -m …; for a list, write "{found[1]}=[{found[2]}]".'
        )
    if found := re.search(r"Could not find '(.+)/([^/']+)'", text):
        return _no_such_option(found[1], found[2], re.findall(r"^\t(\S+)$", text, re.MULTILINE))
    if "missing EQUAL" in text:
        return _no_override(re.findall(r"'([^']*)'", text)[0])
    merging = re.match(r"Error merging override (([^=]+)=.*)", text)
    if (found := merging) and "Cannot merge DictConfig" in str(error.__cause__):
        return (
            f"{found[2]} is a group of values; got {found[1]}. Set single values, as in "
            f"{found[2]}.…=…."
        )
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NerveError):
            return str(cause)
        cause = cause.__cause__
    message = _without_link(text.split("\nConfig search path:")[0])
    if isinstance(error, OverrideParseException):
        return (
            f"Hydra must be able to parse each override: {message}. Quote values with special "
            "characters: \"key='value'\"."
        )
    reason = _without_link(str(error.__cause__))
    return f"{message}\n{reason}" if isinstance(error.__cause__, Exception) else message


def explain_unresolved(
    error: OmegaConfBaseException, choices: Mapping[str, str] | None = None
) -> str:
    """Explains why the values of a composed configuration cannot be resolved.

    Args:
        error: raised by resolving them.
        choices: the selected option of each group, if known.
    """
    text = str(error)
    chosen = [f"{group}={name}" for group, name in (choices or {}).items() if f"{group}." in text]
    where = f", which {error.full_key} refers to" if error.full_key else ""
    selected = f"; selected: {', '.join(chosen)}" if chosen else ""
    return (
        f"The values of a run must exist and be compatible; {first_line(error)}{where}. "
        f"Choose compatible options, or set the value{selected}."
    )


def _without_link(text: str) -> str:
    """An error's text without links and without OmegaConf's internal types."""
    text = re.sub(r"\nSee https?:\S+( for details)?", "", text)
    text = re.sub(r"\n\s*(object|reference)_type=.*", "", text)
    return re.sub(r"\n\s*full_key: (.*)", r" (\1)", text).rstrip()


def _no_such_option(group: str, option: str, options: Sequence[str]) -> str:
    if group.startswith("data/"):  # Hydra splits a path at its slashes
        group, option = "data", f"{group.removeprefix('data/')}/{option}"
    close = get_close_matches(option, options, n=1)
    hint = f" Did you mean {group}={close[0]}?" if close else ""
    if group == "data" and re.search(r"[./]", option):
        hint = f" Your own text: data=text_files {pasted('data.corpus.paths', option)}."
    return f"{group} must be one of {', '.join(options)}; got {option!r}.{hint}"


def _no_override(argument: str) -> str:
    sweeps = [path.stem for path in SWEEPS.glob("*.yaml")]
    keys = list(known_keys())
    if argument in sweeps:
        meant = f"--config-name={argument}"
    elif close := get_close_matches(argument, [*sweeps, *keys], n=1):
        meant = f"--config-name={close[0]}" if close[0] in sweeps else f"{close[0]}=…"
    else:
        meant = ""
    hint = f" Did you mean {meant}?" if meant else ""
    return (
        f"An argument must be key=value, or an option that starts with dashes; got {argument!r}."
        f"{hint} nerve-run --help lists all."
    )


def no_such_sweep(name: str) -> str:
    """The message for a `--config-name` that is not a shipped sweep."""
    names = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
    close = get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"--config-name must be one of {', '.join(names)}; got {name!r}.{hint}"


def meant(key: str, known: Iterable[str]) -> str:
    """A hint with the known value that was likely meant, and where all are listed."""
    parent, _, leaf = key.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]
    if siblings:
        close = [f"{parent}.{name}".strip(".") for name in get_close_matches(leaf, siblings, n=1)]
    else:
        close = get_close_matches(key, list(known), n=1)
    close = close or _of_the_same_leaf(key, known)
    return (f" Did you mean {close[0]!r}?" if close else "") + " nerve-run --cfg job lists all."


def _of_the_same_leaf(key: str, known: Iterable[str]) -> list[str]:
    """The value with the same last name in a nested group, if there is exactly one."""
    depth, leaf = key.count(".") + 1, key.rpartition(".")[2]
    same = [o for o in known if o.count(".") == depth and o.rpartition(".")[2] == leaf]
    return same if len(same) == 1 else []


def known_keys() -> dict[str, str]:
    """The full names of all values of all groups' options, each with an option that has it, empty
    for those that every configuration has; and the groups themselves."""
    keys: dict[str, str] = {}
    for path in sorted(CONF.rglob("*.yaml")):
        group = path.parent.relative_to(CONF).as_posix().strip(".")
        if group.startswith("hydra"):
            continue
        is_global = "@package _global_" in path.read_text(encoding="utf-8")
        prefix = "" if is_global or not group else f"{group}."
        names = [f"{prefix}{key}" for key in _flat(_loaded(path)) if key != "defaults"]
        for name in [*names, *([group] if group else [])]:
            keys.setdefault(name, f"{group}={path.stem}" if group else "")
    return keys


def _loaded(path: Path) -> Mapping[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(path))
    return {str(k): v for k, v in values.items()} if isinstance(values, dict) else {}


def _flat(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield key
        if isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in _flat(value))
