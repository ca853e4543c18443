"""What the monitor needs to know about a Lightning fit: whether it will measure anything, and what
its trainer and module say about their data."""

import logging
from collections.abc import Callable, Collection
from typing import Any
from weakref import WeakSet

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from nerve.config import require
from nerve.errors import ConfigError, MeasurementError
from nerve.measuring.choice import Choice, call_probed
from nerve.measuring.ffns import declared_widths, sites_of
from nerve.measuring.find import find_ffns
from nerve.measuring.forward import call_as_taken, evaluating
from nerve.measuring.found import FoundFFNs
from nerve.measuring.masks import Masks
from nerve.measuring.messages import gathered
from nerve.measuring.probe import Probe
from nerve.measuring.slices import Slice
from nerve.recording.recorder import Recorder
from nerve.recording.settings import MonitorSettings
from nerve.recording.writer import is_measured, monitored_values
from nerve.training.updates import NEVER

log = logging.getLogger(__name__)


def require_validation(trainer: L.Trainer, source: str) -> None:
    """Raises `ConfigError` if held-out features are to be measured in a fit without validation."""
    require(
        source == "train" or trainer.enable_validation,
        "source='heldout' measures the validation batches, and this fit has none: it has no "
        f"validation loader, no validation_step, or limit_val_batches={trainer.limit_val_batches}. "
        "Pass validation batches to trainer.fit, or set source='train'.",
    )


class FFNSearch:
    """The search for the FFNs of a module. It runs before the module's own `setup` and
    `configure_model`; FFNs that these build would not be measured.

    Args:
        module: the module that is trained.
        layers: the layers to measure; None for all.

    Raises:
        ConfigError: if the module has no FFN yet, and may build some later.
        MeasurementError: if it has none.
    """

    def __init__(self, module: L.LightningModule, layers: Collection[int] | None) -> None:
        self._known = WeakSet(module.modules())
        try:
            self.found: FoundFFNs = find_ffns(module, layers=layers)
        except MeasurementError as error:
            if not any(is_overridden(name, module) for name in ("setup", "configure_model")):
                raise
            raise ConfigError(f"{_EARLY} Build the model in __init__. {error}") from error
        self.found.warn()

    def require_complete(self, module: L.LightningModule) -> None:
        """Raises `ConfigError` if there are further FFNs by now."""
        late = {
            each: path
            for path, each in module.named_modules()
            if declared_widths(each) is not None
            and self._known.isdisjoint(each.modules())  # a wrapper of FSDP has known ones
        }
        if len(late) < 2:  # such as a head
            return
        ends = [sites_of(ffn)[1].module for ffn in find_ffns(module)]
        further = [late[each] for each in ends if each in late]
        require(
            not further,
            f"{_EARLY} By now there are also those that end with {', '.join(further[:4])}. Build "
            "the model in __init__; or pass ffns=nerve.find_ffns(module), made before the fit, to "
            "measure only those that exist then.",
        )


_EARLY = "FFNs are found before setup and configure_model of a LightningModule run."


def require_batches(trainer: L.Trainer, source: str) -> None:
    """Raises `ConfigError` if held-out features are to be measured and the loader is empty."""
    if source == "train" or not trainer.num_val_batches:
        return
    require(
        trainer.num_val_batches[0] != 0,
        "source='heldout' measures the batches of the first validation loader, which has "
        f"none (limit_val_batches={trainer.limit_val_batches}). Add validation batches, or set "
        "source='train'.",
    )


def warn_of_nothing(settings: MonitorSettings, n_updates: int) -> None:
    """Warns that a fit has ended without a measurement."""
    rank_zero_warn(
        f"This fit measured nothing in {n_updates} weight updates, with "
        f"source={settings.source}, every_n_steps={settings.every_n_steps}, "
        f"steps={settings.steps}. Only steps of torch optimizers that hold weights of the module "
        "count as updates."
    )


def warn_of_loaders(trainer: L.Trainer) -> None:
    """Warns which one of several validation loaders is measured."""
    n = len(trainer.num_val_batches)
    if n > 1:
        rank_zero_warn(
            "The loss and the features in the rows are those of a single validation loader, the "
            f"first of these {n}. Put the loader to measure first."
        )


def warn_of_intervals(trainer: L.Trainer) -> None:
    """Warns of intervals of validation that were set for a trainer and that the monitor replaces.
    Called before it does."""
    defaults = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    values = {name: getattr(trainer, name) for name in defaults}
    given = [f"{name}={value}" for name, value in values.items() if value != defaults[name]]
    if given and trainer.val_check_interval != NEVER:  # in an earlier fit
        rank_zero_warn(
            f"The trainer's {', '.join(given)} has no effect: SpectralMonitor determines when to "
            "validate, with every_n_steps and steps. Leave it out."
        )


def shares_batches(trainer: L.Trainer) -> bool:
    """Whether Lightning splits the first validation loader among several processes. (nerve's own
    loaders give each process the whole held-out set.)"""
    loaders = tree_leaves(trainer.val_dataloaders)[:1]
    return trainer.world_size > 1 and any(
        isinstance(getattr(each, "sampler", None), DistributedSampler) for each in loaders
    )


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The trainer's callbacks, an attribute that Lightning does not declare."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def is_awaited(trainer: L.Trainer) -> bool:
    """Whether a callback or scheduler monitors a measured value: Lightning raises an error if the
    value does not exist."""
    deciding = [*callbacks_of(trainer), *trainer.lr_scheduler_configs]
    return any(is_measured(getattr(each, "monitor", None)) for each in deciding)


def awaited_values(trainer: L.Trainer, recorder: Recorder) -> dict[str, float]:
    """The values of the latest solved measurement, in every process; waits for the first
    measurement if a callback or scheduler monitors one of them."""
    values = gathered(monitored_values(recorder.latest))[0]
    if not values and is_awaited(trainer):
        log.info("waiting for the first measurement, because a callback monitors its values")
        recorder.drain()
        values = gathered(monitored_values(recorder.latest))[0]
    return values


def token_counts(trainer: L.Trainer) -> Tensor | None:
    """How often each token occurs in the training data, if the data module says so."""
    data = getattr(trainer, "datamodule", None)
    return getattr(data, "token_counts", None)


def choice_of(
    module: L.LightningModule,
    probe: Probe,
    settings: MonitorSettings,
    mask: Callable[[Any], Masks] | None,
    exclude: Collection[int],
    only_labeled: bool,
) -> Choice:
    """Which samples of the module's batches count; `mask`, `exclude` and `only_labeled` as in
    `SpectralMonitor`."""
    model = _holder(module, probe)

    def run(batch: Any) -> object:
        with evaluating(model, probe):
            return call_probed(probe, call_as_taken, model, batch)

    mask = getattr(module, "padding_mask", None) if mask is None else mask
    skip_first, groups = settings.skip_first, settings.groups
    return Choice(model, probe, run, mask, tuple(exclude), only_labeled, skip_first, groups)


def _holder(module: L.LightningModule, probe: Probe) -> nn.Module:
    """The direct child of a module that contains all FFNs, or else the module itself."""
    modules = {site.module for ffn in probe.ffns for site in sites_of(ffn)}
    sites = {each.holder if isinstance(each, Slice) else each for each in modules}
    return next((part for part in module.children() if sites <= {*part.modules()}), module)
