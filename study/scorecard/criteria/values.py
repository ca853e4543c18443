"""Quantities computed from the spectra and losses of runs: one number per run, or per step."""

import numpy as np

from criteria.measured import Measured
from nerve.analysis.compare import last_crossing
from nerve.analysis.partial import partial_correlation


def final(series: np.ndarray) -> np.ndarray:
    """The value at the last step, from shape (run, step, …)."""
    return series[:, -1]


def gained(series: np.ndarray) -> np.ndarray:
    """The value at the last step minus that at step 0: the effect of training."""
    return series[:, -1] - series[:, 0]


def region(runs: Measured, first: float, last: float) -> slice:
    """Layers from a share of the depth to another: 1/3 and 2/3 are layers 4 to 7 of 12."""
    n = runs.n_layers
    return slice(round(first * n), round(last * n))


def mean_of(
    runs: Measured, name: str, first: float = 0.0, last: float = 1.0, *, log: bool = False
) -> np.ndarray:
    """Mean over layers of a metric, or the logarithm of that mean, shape (run, step)."""
    values = runs.spectra[name][:, :, region(runs, first, last)].mean(axis=2)
    return np.log(values) if log else values


def log_gain(runs: Measured, first: float = 0.0, last: float = 1.0) -> np.ndarray:
    """log(PR_post / PR_pre) of each layer, shape (run, step, layer)."""
    own = region(runs, first, last)
    return np.log(runs.spectra["pr_post"][:, :, own] / runs.spectra["pr_pre"][:, :, own])


def band(runs: Measured) -> np.ndarray:
    """Lowest JS of layers L/6 to L/3 minus the highest of layer 0 and of the deeper half, (run,).

    With 12 layers: 2 to 4 against 0 and 6 to 11.
    """
    js = final(runs.spectra["js"])
    n = runs.n_layers
    outside = np.r_[0, np.arange(n // 2, n)]
    return js[:, n // 6 : n // 3 + 1].min(axis=1) - js[:, outside].max(axis=1)


def tracking(runs: Measured, name: str) -> np.ndarray:
    """-r of a metric's mean over layers and the loss given log(step + 1), after warm-up, (run,).

    nan with fewer than 8 measured steps after warm-up, too few for a control and a correlation.
    """
    warm = (runs.runs["optimizer.schedule.warmup"] * runs.runs["trainer.max_steps"]).max()
    late = runs.steps > warm
    if late.sum() < 8:
        return np.full(len(runs), np.nan)
    clock = np.log1p(runs.steps[late])
    return -partial_correlation(mean_of(runs, name)[:, late], runs.loss[:, late], [clock])


def at_equal_loss(series: np.ndarray, runs: Measured, names: tuple[str, ...]) -> np.ndarray:
    """A series at the highest final loss of these designs, interpolated over the loss, (run,).

    nan for a run that never crosses it on the way down.
    """
    level = runs.loss[runs.of(names), -1].max()
    places = [last_crossing(loss, level) for loss in runs.loss]
    return np.array(
        [
            np.nan if place is None else place.interpolate(own)
            for place, own in zip(places, series, strict=True)
        ]
    )


def design_means(runs: Measured, values: np.ndarray) -> np.ndarray:
    """Mean over the runs of each design, in the order of their names, shape (design,)."""
    return np.array([values[runs.design == name].mean() for name in np.unique(runs.design)])


def seconds(runs: Measured) -> tuple[np.ndarray, np.ndarray]:
    """The time of one measurement, including validation, and of one training step; shape (run,)."""
    measuring = runs.runs["final.measuring_seconds"].to_numpy(float)
    training = runs.runs["final.train_seconds"].to_numpy(float)
    return measuring / len(runs.steps), (training - measuring) / runs.steps[-1]


def share_at_1000(runs: Measured) -> np.ndarray:
    """The share of the training time that measuring every 1000 steps would take, shape (run,)."""
    measurement, step = seconds(runs)
    return measurement / (1000 * step)


def log_steps(runs: Measured) -> np.ndarray:
    """Logarithm of the number of steps that take as long as one measurement, shape (run,)."""
    measurement, step = seconds(runs)
    return np.log(measurement / step)
