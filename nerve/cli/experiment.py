"""One run, from its configuration to its run directory."""

import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.conf import HydraConf
from hydra.types import RunMode
from hydra.utils import get_class
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from nerve.cli.compose import build, resolved
from nerve.cli.progress import RunProgressBar
from nerve.cli.summary import print_summary
from nerve.errors import ConfigError, StoreError
from nerve.heartbeat import Heartbeat
from nerve.logger import StoreLogger
from nerve.models import MODELS, build_model
from nerve.module import ImageClassifier, LanguageModel, TrainedModel
from nerve.monitor import SpectralMonitor
from nerve.optim import Part, Schedule, build_optimizer
from nerve.probe import find_ffns
from nerve.results.record import RunRecord
from nerve.results.store import RunStore
from nerve.values import from_mapping, require, require_choice

SAMPLES_PER_DIMENSION = 8
"""`monitor.n_tokens=auto` measures this many tokens a dimension of the widest FFN (N/D)."""


TASKS: dict[str, tuple[type[TrainedModel], str]] = {
    "gpt": (LanguageModel, "tokens"),
    "mixer": (ImageClassifier, "images"),
}
"""The kind of a model to the Lightning module that trains it, and what its batches count."""


def run_experiment(config: DictConfig, hydra_config: HydraConf) -> float:
    """Trains, measures and records one run in Hydra's output directory.

    Returns:
        The final validation loss, nats a target.

    Raises:
        NerveError: for what the user can mend; the run is recorded as failed.
    """
    _check(config)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning's
    directory = Path(hydra_config.runtime.output_dir)
    # Of several processes, rank 0 records; it started the others with its directory.
    if rank_zero_only.rank > 0:  # type: ignore[attr-defined]
        return _run(config, directory, None)
    record = _begin(config, hydra_config, directory)
    try:
        return _run(config, directory, record)
    except BaseException as error:
        # Lightning turns Ctrl-C into SystemExit.
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        record.finish("interrupted" if interrupted else "failed", error=error)
        raise


def _check(config: DictConfig) -> None:
    """Refuses what cannot be resolved: data of the other kind, and values that were not given."""
    kind, target = config.model.kind, config.data.get("_target_")
    require_choice("model.kind", kind, TASKS)
    try:
        data = get_class(target)
    except Exception as error:  # an import runs code that may raise anything
        raise ConfigError(f"data._target_ must name a class; got {target!r}: {error}") from error
    suited = [
        other
        for other, network in MODELS.items()
        if all(hasattr(data, fact) for fact in network.FACTS)
    ]
    # Data that says of no model that it suits it is asked again once it is set up.
    require(
        kind in suited or not suited,
        f"Data and model must suit each other; model.kind={kind} cannot be trained on "
        f"{data.__name__}, which is for model.kind={' or '.join(suited)}. Choose another data "
        "group or another model.",
    )
    missing = sorted(OmegaConf.missing_keys(config))
    require(
        not missing,
        f"Values without a default must be given; {', '.join(missing)} is missing. "
        f"Add {' '.join(f'{key}=…' for key in missing)}.",
    )


def _begin(config: DictConfig, hydra_config: HydraConf, directory: Path) -> RunRecord:
    if (directory / "run.json").exists():
        earlier = RunRecord.load(directory)
        raise StoreError(
            f"A run needs a directory of its own; {directory} holds run {earlier.run_id} "
            f"({earlier.run_status}). Choose another with hydra.run.dir=…, or delete that one."
        )
    values = resolved(config)
    is_cell = hydra_config.mode == RunMode.MULTIRUN
    record = RunRecord.create(
        directory,
        values,
        run_id=None if is_cell else OmegaConf.create({"id": "${run_id:}"}).id,
        sweep=directory.parent.name if is_cell else None,
        seed=values["seed"],
    )
    for name, content in (
        ("config", config),
        ("hydra", OmegaConf.create({"hydra": hydra_config})),
        ("overrides", hydra_config.overrides.task),
    ):
        path = directory / ".hydra" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        OmegaConf.save(content, path)
    return record


def _run(config: DictConfig, directory: Path, record: RunRecord | None) -> float:
    values = resolved(config)
    if values["threads"] is not None:
        torch.set_num_threads(values["threads"])
    kind = values["model"]["kind"]
    trained_model, unit = TASKS[kind]
    require(
        isinstance(values["seed"], int) and 0 <= values["seed"] < 2**32,
        f"seed must be a whole number from 0 to 2**32 - 1; got {values['seed']!r}.",
    )
    L.seed_everything(values["seed"], verbose=False)

    data = _build_data(config, values)
    facts = {fact: getattr(data, fact) for fact in MODELS[kind].FACTS if hasattr(data, fact)}
    model = build_model(values, seed=values["seed"], **facts)
    module = trained_model(
        model,
        lambda built: build_optimizer(built, _parts(config)),
        from_mapping(Schedule, values["optimizer"]["schedule"], "optimizer.schedule"),
        compile=values["compile"],
    )
    store = RunStore(directory, record.run_id) if record else None
    measured = {key: value for key, value in values["monitor"].items() if key != "n_tokens"}
    monitor = SpectralMonitor(store, **measured)
    callbacks = [monitor, *([Heartbeat(record)] if record else [])]
    trainer = _build_trainer(config, directory, store, callbacks, unit)
    if record:
        record.update(
            n_parameters=sum(parameter.numel() for parameter in model.parameters()),
            fingerprints=data.fingerprints,
            unigram_loss=getattr(data, "unigram_loss", None),
            device=str(trainer.strategy.root_device),
        )
    began = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data)
    finally:
        if store:
            store.flush(trainer.global_step)
            store.compact()
    final = {
        **_final_scores(trainer, monitor.val_loss, data),
        "train_seconds": time.perf_counter() - began,
        "measuring_seconds": monitor.seconds,
    }
    if record:
        record.finish("done", step=trainer.global_step, final=final)
        print_summary(monitor.latest, _facts(final), directory)
    return final["val_loss"]


def _build_data(config: DictConfig, values: dict[str, Any]) -> Any:
    """The data module, prepared: the model needs facts that only the data knows."""
    trainer = values["trainer"]
    for key in ("max_steps", "accumulate_grad_batches"):
        require(
            isinstance(trainer[key], int) and trainer[key] > 0,
            f"trainer.{key} must be a positive whole number; got {trainer[key]!r}.",
        )
    n_batches = trainer["max_steps"] * trainer["accumulate_grad_batches"]
    sizes: dict[str, int] = {"n_train_batches": n_batches}
    if values["model"]["kind"] == "gpt":
        sizes["n_heldout_tokens"] = _n_tokens(values)
    data = build(config.data, **sizes, seed=values["seed"])
    data.prepare_data()
    data.setup("fit")
    return data


def _n_tokens(values: dict[str, Any]) -> int:
    """`monitor.n_tokens`, with `auto` worked out from the widest FFN of the model."""
    asked = values["monitor"]["n_tokens"]
    if asked != "auto":
        require(
            isinstance(asked, int) and asked > 0,
            f"monitor.n_tokens must be auto or a positive whole number; got {asked!r}.",
        )
        return int(asked)
    with torch.device("meta"):
        skeleton = build_model(values, seed=0, vocab_size=1)
    return SAMPLES_PER_DIMENSION * max(_width(ffn.post) for ffn in find_ffns(skeleton))


def _width(down: nn.Module) -> int:
    width = down.in_features
    assert isinstance(width, int)
    return width


def _parts(config: DictConfig) -> dict[str, Part]:
    built = build(config.optimizer.parts)
    return {str(name): Part(tuple(part.roles), part.build) for name, part in built.items()}


def _build_trainer(
    config: DictConfig,
    directory: Path,
    store: RunStore | None,
    callbacks: list[L.Callback],
    unit: str,
) -> L.Trainer:
    loggers: list[Logger] = [build(logger) for logger in config.logger.values()]
    if store:
        loggers.insert(0, StoreLogger(store))
    callbacks += [build(callback) for callback in config.callbacks.values()]
    if config.trainer.enable_progress_bar:
        callbacks.append(RunProgressBar(unit))
    trainer: L.Trainer = build(
        config.trainer,
        log_every_n_steps=min(config.trainer.log_every_n_steps, config.trainer.max_steps),
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=str(directory),
        max_epochs=-1,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return trainer


def _final_scores(trainer: L.Trainer, val_loss: float | None, data: Any) -> dict[str, float]:
    """What the last validation found; it follows the last step."""
    assert val_loss is not None
    final = {"val_loss": val_loss}
    if "val_accuracy" in trainer.callback_metrics:
        final["val_accuracy"] = float(trainer.callback_metrics["val_accuracy"])
    if hasattr(data, "n_heldout_bytes"):
        bits = val_loss * data.n_heldout_tokens / math.log(2)
        final["bits_per_byte"] = bits / data.n_heldout_bytes
    return final


def _facts(final: dict[str, float]) -> dict[str, str]:
    loss = f"{final['val_loss']:.3f} nats a target"
    if "bits_per_byte" in final:
        loss += f", {final['bits_per_byte']:.3f} bits a byte"
    facts = {"validation loss": loss}
    if "val_accuracy" in final:
        facts["validation accuracy"] = f"{final['val_accuracy']:.4f}"
    share = final["measuring_seconds"] / final["train_seconds"]
    return facts | {
        "time": f"{final['train_seconds']:.1f} s, of which measuring and validating "
        f"{final['measuring_seconds']:.1f} s ({share:.1%})",
    }
