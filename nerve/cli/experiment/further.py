"""What `callbacks` adds to a run, checked before anything is done."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ProgressBar

from nerve.cli.config.compose import build
from nerve.cli.experiment.objective import objectives, of_layers
from nerve.config import require, require_choice


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
            "A run accumulates gradients over as many batches from its first step to its last; "
            f"callbacks.{name} changes it from epoch to epoch. Set "
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
        f"A run shows one progress bar, or none; got {' and '.join(bars)} with "
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
        f"{key}._target_ must name a callback of Lightning; {node['_target_']} makes "
        f"{type(callback).__name__}.",
    )
    assert isinstance(callback, L.Callback)
    return callback
