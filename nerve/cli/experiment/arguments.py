"""Checks values against the parameters of their `_target_`."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from hydra.utils import get_class, get_object
from lightning.pytorch import LightningDataModule

from nerve.cli.config.compose import build
from nerve.config import KINDS, require, require_choice, require_type
from nerve.data.batches import BatchDataModule
from nerve.errors import ConfigError, NerveError

_SET_BY_THE_RUN = {
    "n_heldout_tokens": "monitor.n_tokens",
    "n_train_batches": "trainer.max_steps",
    "seed": "seed",
}
"""Arguments of data modules that the run passes itself, and the keys from which they follow."""


def class_of(group: str, values: Mapping[str, Any]) -> type:
    """The class that the `_target_` of a group names."""
    target = str(values.get("_target_"))
    try:
        return get_class(target)
    except Exception as error:  # an import runs code that may raise anything
        raise ConfigError(f"{group}._target_ must name a class; got {target!r}: {error}") from error


def require_arguments(group: str, target: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuses keys that the `_target_` does not accept."""
    parameters = signature(target).parameters
    if any(each.kind == Parameter.VAR_KEYWORD for each in parameters.values()):
        return
    for key in values:
        if not key.startswith("_"):
            require_choice(f"a key of {group}", key, list(parameters))


def require_types(group: str, target: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuses values whose type does not match the annotation of their parameter, including values
    that are built first; other annotations are left to the target."""
    try:
        parameters = signature(target, eval_str=True).parameters
    except (NameError, TypeError, ValueError):  # an annotation that cannot be read
        return
    for name, value in values.items():
        key = f"{group}.{name}"
        if isinstance(value, Mapping) and "_target_" in value:
            inner = _named(key, value["_target_"])
            require_arguments(key, inner, value)
            require_types(key, inner, value)
        elif name in parameters:
            hint = parameters[name].annotation
            is_union = get_origin(hint) in (Union, UnionType)
            kinds = [get_origin(each) or each for each in (get_args(hint) if is_union else (hint,))]
            known = [list if kind is Sequence else kind for kind in kinds if kind is not Path]
            if all(kind in KINDS for kind in known):
                require_type(key, value, *known)


def _named(key: str, target: object) -> Callable[..., Any]:
    try:
        found: Callable[..., Any] = get_object(str(target))
        if not callable(found):
            raise TypeError(f"it is a {type(found).__name__}")
    except Exception as error:  # an import runs code that may raise anything
        raise ConfigError(
            f"{key}._target_ must name a function; got {target!r}: {error}"
        ) from error
    return found


_ON_THE_CPU: Mapping[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "strategy": "auto",
    "num_nodes": 1,
    "precision": None,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": -1,
    "deterministic": None,
    "benchmark": None,
}
"""What makes a trainer cheap to build and free of effects on the process."""


def require_trainer(trainer: Mapping[str, Any], known: Collection[str]) -> None:
    """Lets Lightning check values besides the `known` ones, if there are any, by building a trainer
    on the CPU; otherwise it would refuse them only once the data is loaded."""
    require_arguments("trainer", class_of("trainer", trainer), trainer)
    if {name for name in trainer if not name.startswith("_")} - {*known, *_ON_THE_CPU}:
        log = logging.getLogger("lightning.pytorch")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            build(trainer, key="trainer", **_ON_THE_CPU)
        finally:
            log.setLevel(level)


def require_data(data: Mapping[str, Any], sizes: Mapping[str, int], seed: int) -> None:
    """Lets nerve's data modules check their values, and `sizes`, those of `DataPlan`. Corpus,
    images and tokenizer are not opened: they may be on another machine."""
    for name, key in _SET_BY_THE_RUN.items():
        require(
            name not in data,
            f"A run sets data.{name} itself; got {data.get(name)!r}. Leave it out, and set {key}.",
        )
    target = class_of("data", data)
    require(
        issubclass(target, LightningDataModule),
        f"data._target_ must name a Lightning data module; {data['_target_']} is another class.",
    )
    if not issubclass(target, BatchDataModule):
        return
    require_arguments("data", target, data)
    given = {key: value for key, value in data.items() if not key.startswith("_")}
    elsewhere = {"tokenizer": None} if "tokenizer" in given else {}
    require_types("data", target, data)
    try:
        target(**{**given, **sizes, **elsewhere}, seed=seed)
    except NerveError:
        raise
    except Exception as error:  # from a value of another type than its argument
        raise ConfigError(f"data cannot be built: {type(error).__name__}: {error}") from error
