"""All that nerve-run uses of Hydra 1.3 beyond Hydra's documented interface.

- `ConfigLoaderImpl` and `apply_overrides`: `Composer` composes the options of trials once and then
  only applies values, which Hydra does itself for each composition.
- `repository_of`: what `get_group_options` asks and creates anew for each group.
- `overrides_dirname`: the value of `hydra.job.override_dirname`, which depends on these values.
- `Callbacks`: `run_job` needs them in a trial's own process.
- `plugin_classes`: Hydra finds plugins only in the namespace package `hydra_plugins`, which nerve
  does not install.
- `error_of`: reading the public `JobReturn.return_value` raises and prints.
"""

from importlib.metadata import version
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus

from nerve.errors import NerveError

try:
    from hydra._internal.callbacks import Callbacks
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_loader_impl import get_overrides_dirname as overrides_dirname

    apply_overrides = ConfigLoaderImpl._apply_overrides_to_config
    repository_of = ConfigLoaderImpl._parse_overrides_and_create_caching_repo
    Plugins.instance().class_name_to_class  # noqa: B018 - whether it exists
    if "_return_value" not in JobReturn.__dataclass_fields__:
        raise AttributeError("JobReturn has no _return_value")
except (ImportError, AttributeError) as error:
    raise NerveError(
        "nerve-run uses internals of Hydra that may differ in every version; it needs "
        f"hydra-core>=1.3.2,<1.4, got {version('hydra-core')}: {error}. Install that version."
    ) from error

__all__ = [
    "Callbacks",
    "ConfigLoaderImpl",
    "apply_overrides",
    "error_of",
    "overrides_dirname",
    "plugin_classes",
    "repository_of",
]


def plugin_classes() -> dict[str, type[Any]]:
    """The classes of plugins, by their names in `_target_`."""
    classes: dict[str, type[Any]] = Plugins.instance().class_name_to_class
    return classes


def error_of(job: JobReturn) -> Exception | None:
    """The error of a job that failed."""
    value = job._return_value
    return value if job.status == JobStatus.FAILED and isinstance(value, Exception) else None
