"""`objective`: the number that a run returns, for sweepers that look for the best one."""

import math
from pathlib import Path

from nerve.config import require_choice
from nerve.metric_names import MEASURED, mean_name, mean_values
from nerve.storage.record import RunRecord

SCORES = {"gpt": ("val_loss", "bits_per_byte"), "mixer": ("val_loss", "val_accuracy")}
"""The kind of a model to the final scores of its runs in `run.json`."""

FFNS = {"gpt": ("ffn",), "mixer": ("token_mixing", "channel_mixing")}
"""The kind of a model to the names of the FFNs in each of its layers."""


def check_objective(name: str, kind: str) -> None:
    """Refuses a name that a run of a model of that kind will not have a number for.

    Raises:
        ConfigError: with the good names.
    """
    means = [mean_name(ffn, metric) for ffn in FFNS[kind] for metric in MEASURED]
    require_choice("objective", name, (*SCORES[kind], *MEASURED, *means))


def objective_of(directory: Path, name: str) -> float:
    """The number that `objective` names, of the run in `directory`, which is done.

    A score is that of the last validation, a metric the mean over layers of the last measurement;
    NaN where nothing could be measured.
    """
    score = RunRecord.load(directory).final.get(name)
    if score is not None:
        return score
    from nerve.analysis.load import load_metrics  # pandas takes long to import

    metrics = load_metrics(directory)
    last = metrics[metrics["step"] == metrics["step"].max()]
    return mean_values(last.to_dict("records")).get(name, math.nan)
