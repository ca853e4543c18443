"""The checkpoints that a run has kept, measured on its own held-out data."""

from typing import Any

import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nerve.cli.experiment.build import build_data
from nerve.cli.experiment.plan import Plan
from nerve.cli.probing.machine import device_of, dtype_of
from nerve.cli.probing.places import check_keeps_weights
from nerve.cli.probing.source import Checkpoint, Data, ProbeArguments
from nerve.config import require, require_left
from nerve.errors import DataError
from nerve.measuring.find import find_ffns
from nerve.measuring.found import FoundFFNs
from nerve.measuring.groups import Grouped
from nerve.storage.directory import RunDirectory
from nerve.training.checkpoint_files import load_model, step_of

_OF_TEXT = ("text", "tokenizer", "n_tokens", "seq_len", "batch_size", "steps")


class KeptCheckpoints:
    """The weights that a run has kept, or the last ones if it was not asked to keep any.

    Args:
        args: the arguments of the command; the only model is the run directory.

    Raises:
        StoreError: for a run without checkpoints.
        DataError: for a run that did not train, such as those of nerve-probe.
        ConfigError: for arguments that only apply to models without held-out data.
    """

    def __init__(self, args: ProbeArguments) -> None:
        given = [f"--{name.replace('_', '-')}" for name in _OF_TEXT if getattr(args, name)]
        require(
            not given,
            f"A run is probed at its stored steps, on its own held-out data; got "
            f"{', '.join(given)}. Leave that out.",
        )
        require(
            len(args.models) == 1,
            f"One run is probed at a time; got {', '.join(args.models)}. Give one directory.",
        )
        self._args = args
        self._device, self._dtype = device_of(args.device), dtype_of(args.dtype)
        self._run = RunDirectory(args.models[0])
        self._record = self._run.require_record()
        check_keeps_weights(self._run.path, self._record.config)
        # Callbacks and loggers are not needed, and may not be installed here.
        needed = {**self._record.config, "callbacks": {}, "logger": {}}
        self._plan = Plan.of(OmegaConf.create(needed))
        self.name = self._run.path.resolve().name
        self.checkpoints = [
            Checkpoint(step, str(self._run.kept_checkpoint(step)))
            for step in self._run.kept_steps()
        ] or [self._last()]

    def _last(self) -> Checkpoint:
        """The last checkpoint, with its own step; unless the run is done, the run's step is
        later."""
        last = self._run.checkpoint("last")
        step = step_of(last) if last.exists() else self._record.step  # `load` says what is missing
        return Checkpoint(step, str(last))

    def load(self, checkpoint: Checkpoint) -> nn.Module:
        """The model. Raises as `load_model` does."""
        if checkpoint.step in self._run.kept_steps():
            model = load_model(self._run.path, step=checkpoint.step)
        else:
            model = load_model(self._run.path, "last")
        return model.to(self._device, self._dtype)

    def find(self, model: nn.Module) -> FoundFFNs:
        """The requested FFNs; by default those that the run measures."""
        layers = self._args.layers or self._plan.monitor.layers
        return find_ffns(model, layers=layers, select=self._args.select)

    def data(self, model: nn.Module, ffns: FoundFFNs) -> Data:
        """The held-out data of the run.

        Raises:
            DataError: if they have changed.
        """
        plan, record, args = self._plan, self._record, self._args
        data = build_data(plan)
        if data.fingerprints != record.fingerprints:
            raise DataError(
                f"A run is probed on its own held-out data; those of {self._run.path} had the "
                f"fingerprints {record.fingerprints}, now they are {data.fingerprints}. Restore "
                "the old data."
            )
        own = plan.monitor.skip_first
        skip_first = own if args.skip_first is None else args.skip_first
        dtype = next(model.parameters()).dtype

        def placed(tensor: Any) -> Any:
            return tensor.to(self._device, dtype if tensor.is_floating_point() else None)

        batches = [tree_map(placed, tuple(batch)) for batch in data.val_dataloader()]
        if plan.model.kind == "gpt":
            require_left("--skip-first", skip_first, "data.seq_len", batches[0][0].shape[1])
        _, targets = next(iter(data.train_dataloader()))
        n_targets = targets.numel() * plan.trainer.accumulate_grad_batches
        groups = tuple(plan.monitor.groups) if args.groups is None else args.groups
        sites = tuple(plan.monitor.sites) if args.sites is None else args.sites
        probe = args.as_recorded(dtype, skip_first, groups, sites, data.fingerprints)
        return Data(
            batches=batches,
            forward=_loss_of,
            config={**record.config, "probe": probe},
            record={
                "fingerprints": record.fingerprints,
                "seed": record.seed,
                "unigram_loss": record.unigram_loss,
                "separator_token": record.separator_token,
            },
            skip_first=skip_first,
            shortcut=plan.monitor.shortcut,
            tokens_seen=lambda step: step * n_targets,
            grouped=Grouped(groups, getattr(data, "token_counts", None)),
            sites=sites,
        )


def _loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The loss as in training: the mean over the targets."""
    inputs, targets = batch
    logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return {"loss": loss, "n_targets": targets.numel()}
