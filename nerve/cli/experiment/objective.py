"""The numbers that a run has: the one that it returns, and those that its callbacks monitor."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ProgressBar

from nerve.cli.config.compose import build
from nerve.config import require, require_choice
from nerve.metric_names import MEASURED
from nerve.recording.writer import layer_name, mean_name, mean_values
from nerve.storage.directory import RunDirectory
from nerve.storage.parts import read_parts, warn_damaged
from nerve.storage.schema import DATASETS

SCORES = {"gpt": ("val_loss", "bits_per_byte"), "mixer": ("val_loss", "val_accuracy")}
"""The kind of a model to the final scores of its runs in `run.json`."""

FFNS = {"gpt": ("ffn",), "mixer": ("token_mixing", "channel_mixing")}
"""The kind of a model to the names of the FFNs in each of its layers."""


def check_objective(name: str, kind: str) -> None:
    """Refuses a name that a run of a model of that kind will not have a number for.

    Raises:
        ConfigError: with the good names.
    """
    require_choice("objective", name, objectives(kind))


def objectives(kind: str) -> tuple[str, ...]:
    """The numbers that a run of a model of that kind has at its end."""
    means = (mean_name(ffn, metric) for ffn in FFNS[kind] for metric in MEASURED)
    return (*SCORES[kind], *MEASURED, *means)


def of_layers(kind: str, layers: Iterable[int]) -> set[str]:
    """The numbers of single layers that callbacks of such a run can monitor."""
    return {
        layer_name(ffn, layer, metric)
        for ffn in FFNS[kind]
        for layer in layers
        for metric in MEASURED
    }


def objective_of(run: RunDirectory, name: str) -> float:
    """The number that `objective` names, of a run that is done.

    A score is that of the last validation, a metric the mean over layers of the last measurement;
    NaN where nothing could be measured.
    """
    score = run.require_record().final.get(name)
    if score is not None:
        return score
    table, damaged = read_parts(run.path, DATASETS["metrics"], run.require_record().run_id)
    warn_damaged(damaged)
    rows = table.select(["step", "ffn", *MEASURED]).to_pylist()
    last = max((row["step"] for row in rows), default=None)
    return mean_values(row for row in rows if row["step"] == last).get(name, math.nan)


def callbacks_of(values: Mapping[str, Any]) -> list[L.Callback]:
    """The callbacks of a configuration, built.

    Raises:
        ConfigError: for what is no callback, monitors what no run of this kind logs, or changes
            what the run itself decides.
    """
    callbacks = [_callback(name, node) for name, node in values["callbacks"].items()]
    for name, callback in zip(values["callbacks"], callbacks, strict=True):
        require(
            not isinstance(callback, GradientAccumulationScheduler),
            "A run accumulates gradients over the same number of batches at every step; "
            f"callbacks.{name} changes it between epochs. Set "
            "trainer.accumulate_grad_batches.",
        )
    bars = [
        f"callbacks.{name}"
        for name, callback in zip(values["callbacks"], callbacks, strict=True)
        if isinstance(callback, ProgressBar)
    ]
    shows = values["trainer"].get("enable_progress_bar", True)
    require(
        len(bars) <= int(bool(shows)),
        f"A run shows at most one progress bar; got {' and '.join(bars)} with "
        f"trainer.enable_progress_bar={str(shows).lower()}. Leave one out, or set that to true.",
    )
    # A callback of one's own may log what another one monitors.
    if all(type(callback).__module__.startswith("lightning.") for callback in callbacks):
        kind = values["model"]["kind"]
        logged = ("train_loss", "penalty", *objectives(kind))
        layers = range(n) if isinstance(n := values["model"].get("n_layers"), int) else ()
        for name, callback in zip(values["callbacks"], callbacks, strict=True):
            monitor = getattr(callback, "monitor", None)
            if monitor is not None and monitor not in of_layers(kind, layers):
                require_choice(f"callbacks.{name}.monitor", monitor, logged)
    return callbacks


def _callback(name: str, node: Any) -> L.Callback:
    key = f"callbacks.{name}"
    require(
        isinstance(node, Mapping) and "_target_" in node,
        f"{key} must be a mapping with the class of a callback under _target_; got {node!r}.",
    )
    callback = build(node, key=key)
    require(
        isinstance(callback, L.Callback),
        f"{key}._target_ must name a Lightning callback; {node['_target_']} gives "
        f"{type(callback).__name__}.",
    )
    assert isinstance(callback, L.Callback)
    return callback
