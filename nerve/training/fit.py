"""A fit of Lightning as the monitor finds it: whether it will measure anything, and what its
trainer and its module say of their data."""

import logging
from collections.abc import Callable, Collection
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from nerve.config import require
from nerve.measuring.choice import Choice, call_probed
from nerve.measuring.distributed import gathered
from nerve.measuring.ffns import sites_of
from nerve.measuring.forward import call, evaluating
from nerve.measuring.masks import Masks
from nerve.measuring.probe import Probe
from nerve.metric_names import MEASURED
from nerve.recording.recorder import Recorder
from nerve.recording.settings import MonitorSettings
from nerve.recording.writer import monitored_values

log = logging.getLogger(__name__)


def require_validation(trainer: L.Trainer, source: str) -> None:
    """Raises `ConfigError` for held-out features in a fit that validates nothing."""
    require(
        source == "train" or trainer.enable_validation,
        "monitor.source=heldout measures the validation batches, and this fit has none: it has no "
        f"validation loader, no validation_step, or limit_val_batches={trainer.limit_val_batches}. "
        "Give trainer.fit validation batches, or take source='train'.",
    )


def require_batches(trainer: L.Trainer, source: str) -> None:
    """Raises `ConfigError` for held-out features where the loader turns out to be empty."""
    if source == "train" or not trainer.num_val_batches:
        return
    require(
        trainer.num_val_batches[0] != 0,
        "monitor.source=heldout measures the batches of the first validation loader, which has "
        f"none (limit_val_batches={trainer.limit_val_batches}). Give it some, or take "
        "source='train'.",
    )


def warn_of_nothing(settings: MonitorSettings, n_updates: int) -> None:
    """Says that a fit has ended without a measurement."""
    rank_zero_warn(
        f"This fit has measured nothing in {n_updates} weight updates, with "
        f"source={settings.source}, every_n_steps={settings.every_n_steps}, "
        f"steps={settings.steps}. Updates are counted where an optimizer of torch that holds "
        "weights of the module steps."
    )


def warn_of_loaders(trainer: L.Trainer) -> None:
    """Says which one of several validation loaders is measured."""
    n = len(trainer.num_val_batches)
    if n > 1:
        rank_zero_warn(
            f"The rows have the loss and the features of one validation loader, the first of these "
            f"{n}: two sets of data are not one sample. Put the one to measure first."
        )


def shares_batches(trainer: L.Trainer) -> bool:
    """Whether Lightning gives each of several processes its part of the first validation loader;
    those of nerve give each all of the held-out set."""
    loaders = tree_leaves(trainer.val_dataloaders)[:1]
    return trainer.world_size > 1 and any(
        isinstance(getattr(each, "sampler", None), DistributedSampler) for each in loaders
    )


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """The trainer's callbacks, which Lightning does not declare."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def is_awaited(trainer: L.Trainer) -> bool:
    """Whether what decides by a monitored value names one of a measurement: Lightning refuses to go
    on where it is not there."""
    deciding = [*callbacks_of(trainer), *trainer.lr_scheduler_configs]
    names = (getattr(each, "monitor", None) for each in deciding)
    return any(str(name).rpartition("/")[-1] in MEASURED for name in names)


def awaited_values(trainer: L.Trainer, recorder: Recorder) -> dict[str, float]:
    """The values of the last measurement that is solved, in every process; where a callback or a
    schedule decides by one, the first measurement is waited for."""
    values = gathered(monitored_values(recorder.latest))[0]
    if not values and is_awaited(trainer):
        log.info("the first measurement is waited for, as a callback monitors its values")
        recorder.drain()
        values = gathered(monitored_values(recorder.latest))[0]
    return values


def token_counts(trainer: L.Trainer) -> Tensor | None:
    """How often each token occurs in training, where the data module says it."""
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
    """Which samples of the module's batches count; `mask`, `exclude` and `only_labeled` as of
    `SpectralMonitor`."""
    model = _holder(module, probe)

    def run(batch: Any) -> object:
        with evaluating(model, probe):
            return call_probed(probe, call, model, batch)

    mask = getattr(module, "padding_mask", None) if mask is None else mask
    skips, groups = settings.skip_first > 0, bool(settings.groups)
    return Choice(model, probe, run, mask, tuple(exclude), only_labeled, skips, groups)


def _holder(module: L.LightningModule, probe: Probe) -> nn.Module:
    """The part of a module that holds all FFNs, where it is one; else the module itself."""
    sites = {site.module for ffn in probe.ffns for site in sites_of(ffn)}
    return next((part for part in module.children() if sites <= {*part.modules()}), module)
