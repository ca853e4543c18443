"""Where Hydra finds configuration files, and the resolvers for interpolations."""

import base64
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.errors import InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from nerve.cli.config.hydra_internals import plugin_classes
from nerve.errors import ConfigError, NerveError
from nerve.storage.identity import EXCLUDED, config_id, new_run_id

PACKAGE = Path(__file__).resolve().parents[2]


def _shipped(folder: str) -> Path:
    """`folder` inside the installed package, or next to the package in a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


CONF = _shipped("conf")
SWEEPS = _shipped("sweeps")


SUBMITIT_SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
"""The launcher that submits trials to SLURM."""


class SweepsSearchPath(SearchPathPlugin):
    """Lets `--config-name` find the files of sweeps/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="nerve", path=f"file://{SWEEPS}")


def register(plugins: Mapping[str, type] | None = None) -> None:
    """Registers the search path, the resolver of ids and, by their `_target_` names, Hydra plugins,
    for one invocation of a command.

    `${run_id:}` is one new id, for the directory and the record of a single run.
    """
    Plugins.instance().register(SweepsSearchPath)
    plugin_classes().update(plugins or {})
    run_id = new_run_id()
    OmegaConf.register_new_resolver("run_id", lambda: run_id, replace=True)


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, interpolations resolved."""
    return _plain(config, resolve=True)


def unresolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, with interpolations as strings."""
    return _plain(config, resolve=False)


def _plain(config: DictConfig, resolve: bool) -> dict[str, Any]:
    values = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def encoded(config: DictConfig) -> bytes:
    """A composed configuration, including Hydra's own node, as one line for a child process;
    interpolations are kept, and so are the types of keys, unlike in JSON."""
    return base64.b64encode(pickle.dumps(OmegaConf.to_container(config, enum_to_str=True))) + b"\n"


def decoded(line: bytes) -> DictConfig:
    """The configuration that `encoded` serialized, with the types that Hydra requires. The line
    must come from the parent process: reading it runs whatever it contains."""
    schema = OmegaConf.create({"hydra": HydraConf})
    OmegaConf.set_struct(schema.hydra, False)
    del schema.hydra["defaults"]
    config = OmegaConf.merge(schema, pickle.loads(base64.b64decode(line)))
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)
    return config


def build(node: Any, *, key: str, **arguments: Any) -> Any:
    """Instantiates `_target_`, with errors that the user can fix.

    Args:
        node: values, resolved.
        key: the name of the node in the configuration, for messages.
        arguments: further arguments, which take precedence.

    Raises:
        NerveError: as raised by the target, or `ConfigError` if it could not be called.
    """
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, NerveError):
            raise error.__cause__ from error
        text, _, inner = str(error).partition("\nfull_key: ")
        cause = error.__cause__
        reason = text if cause is None else f"{type(cause).__name__}: {cause}"
        where = f"{key}.{inner}" if inner else key
        raise ConfigError(f"{where} cannot be built: {reason}") from error
    except TypeError as error:  # of Hydra's own flags, such as _partial_
        raise ConfigError(f"{key} cannot be built: {error}") from error


def identity(config: DictConfig) -> str:
    """The `config_id` of a configuration, without resolving values that do not count."""
    return config_id(resolved(_counted(config)))


def depends_on_place(config: DictConfig) -> bool:
    """Whether values that count depend on where the job runs."""
    text = OmegaConf.to_yaml(_counted(config))
    return any(f"${{{resolver}:" in text for resolver in ("hydra", "oc.env"))


def _counted(config: DictConfig) -> DictConfig:
    """The part of a configuration that `config_id` covers, with interpolations kept."""
    counted = OmegaConf.masked_copy(config, [str(key) for key in config if key not in EXCLUDED])
    with open_dict(counted):
        for key in EXCLUDED:
            parent, _, leaf = key.rpartition(".")
            node = OmegaConf.select(counted, parent) if parent else counted
            if isinstance(node, DictConfig):
                node.pop(leaf, None)
    return counted


def _config_id_of_root(*, _root_: DictConfig) -> str:
    return identity(_root_)


# `${config_id:}`, the id of the surrounding configuration, names the directory of a trial; a
# cluster job resolves it before it calls any of our code.
OmegaConf.register_new_resolver("config_id", _config_id_of_root, replace=True)
