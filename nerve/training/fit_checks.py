"""Whether a fit will measure anything, said before it begins; and whether it has, at its end."""

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from nerve.config import require
from nerve.recording.settings import MonitorSettings


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
