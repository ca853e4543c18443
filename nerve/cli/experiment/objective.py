"""`objective`: the number that a run returns, for sweepers that look for the best one."""

import math
from collections.abc import Iterable

from nerve.config import require_choice
from nerve.metric_names import MEASURED
from nerve.recording.means import layer_name, mean_name, mean_values
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
