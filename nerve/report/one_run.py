"""The content of a report on one run."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

from nerve.analysis.correlate import RESULTS, correlate_within_runs
from nerve.analysis.factors import find_factors, level_text, levels_of
from nerve.analysis.load import Runs
from nerve.metric_names import columns_of, shown_in
from nerve.report import figures_of_one_run
from nerve.report.comparisons import within_drawings
from nerve.report.content import (
    WINDOW_TEXTS,
    Content,
    Drawing,
    Table,
    dead_layers,
    known,
    limits,
    outlying_rows,
    sampled_rows,
)
from nerve.report.groups import group_drawings, group_tables, last_of

SIZES = ("layer", "ffn", "step", "n_samples", "d_ff", "d_in")
SHOWN = columns_of(lambda metric: "tables" in metric.shown)
"""The metrics in the table of the last step."""


def content_of_run(loaded: Runs, window: str, steps: Sequence[int] = ()) -> Content:
    """Figures and tables of one run.

    Args:
        loaded: a single run; it may have no metrics, spectra and scalars.
        window: the window of r in the titles of the overview, one of `WINDOWS`.
        steps: the steps whose spectra are drawn; if empty, they are chosen.
    """
    runs, metrics, spectra = loaded.frame, loaded.metrics, loaded.spectra
    run, flags = runs.iloc[0], loaded.flags.iloc[0]
    content = Content(title=f"Run {run['run_id']}", facts=_facts(run, flags, runs))
    if flags["flag"] != "ok":
        content.notes.append(f"This run is flagged “{flags['flag']}”: {flags['reason']}")
    content.notes += [*dead_layers(metrics), *outlying_rows(metrics), *sampled_rows(metrics)]
    within = correlate_within_runs(metrics, runs)
    chosen = within[within["window"] == window]
    groups = last_of(loaded.groups)
    for ffn, rows in metrics.groupby("ffn", sort=False, observed=True):
        own = chosen[chosen["ffn"] == ffn]
        content.drawings += _drawings(
            str(ffn),
            rows,
            spectra[spectra["ffn"] == ffn],
            own,
            f"run {run['run_id']}",
            window,
            steps,
        )
        content.drawings += group_drawings(str(ffn), groups[groups["ffn"] == ffn], run["run_id"])
    if len(metrics) and spectra.empty:
        content.notes.append("No spectra are shown, because none were stored (monitor.spectra).")
    content.notes += _unmeasured(spectra, steps)
    if len(metrics) or len(loaded.scalars):
        content.drawings.append(_training(metrics, loaded.scalars, run))
    content.tables += _tables(run, metrics, within, runs)
    content.tables += group_tables(groups)
    return content


def _facts(run: pd.Series, flags: pd.Series, runs: pd.DataFrame) -> list[tuple[str, str]]:
    final = [name for name in runs.columns if name.startswith("final.")]
    facts = {
        "directory": run["directory"],
        "status": run["run_status"],
        "flag": flags["flag"],
        "steps": f"{run['step']:,}",
        "seed": None if pd.isna(run["seed"]) else level_text(run["seed"]),
        "parameters": run["n_parameters"],
        "final validation loss (nats)": flags["final_loss"],
        "unigram loss (nats)": flags["unigram_loss"],
        **{name: run[name] for name in final if name != "final.val_loss"},
        **find_factors(runs).constant,
        "host": run["host"],
        "device": run["device"],
        "commit": run["git_commit"],
        "held-out set": flags["heldout"],
    }
    known = {name: value for name, value in facts.items() if pd.notna(value)}
    return [(name, _fact(value)) for name, value in known.items()]


def _fact(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.5g}"


def _unmeasured(spectra: pd.DataFrame, steps: Sequence[int]) -> list[str]:
    stored = spectra["step"].unique().tolist()
    missing = [f"{step:,}" for step in steps if step not in stored]
    if not missing or not stored:
        return []
    return [
        f"No spectra were stored at {'step' if len(missing) == 1 else 'steps'} "
        f"{', '.join(missing)}; the nearest stored ones are drawn."
    ]


def _drawings(
    ffn: str,
    metrics: pd.DataFrame,
    spectra: pd.DataFrame,
    correlations: pd.DataFrame,
    run: str,
    window: str,
    steps: Sequence[int],
) -> list[Drawing]:
    suffix, title = ("", run) if ffn == "ffn" else (f"_{ffn}", f"{run}, {ffn}")
    n_layers = metrics["layer"].nunique()
    about = f"{limits(metrics)} One run, one seed."
    first = correlations["first_step"].min() if len(correlations) else None
    over = WINDOW_TEXTS[window] + (f" (from step {first:,})" if pd.notna(first) else "")
    drawings = [
        Drawing(
            f"overview{suffix}",
            f"{_overview_names(n_layers)}. r: Pearson correlation of the mean over layers with the "
            f"validation loss over {over}; the points of one run are not independent. {about}",
            partial(figures_of_one_run.overview, metrics, correlations, f"{title}; r over {over}"),
        ),
        Drawing(
            f"gain{suffix}",
            "PR gain = PR post / PR pre, ΔEEE = EEE post − EEE pre, and the share of "
            "post's variance outside the span of pre, by layer and step. In the first two maps, "
            "purple means that the nonlinearity flattens the spectrum, and orange the opposite. "
            f"Gray: nothing could be measured. {about}",
            partial(figures_of_one_run.gain_maps, metrics, title),
        ),
    ]
    drawings += within_drawings(correlations, window, suffix, f"{title}; r over {over}", about)
    if len(spectra):
        shown = figures_of_one_run.chosen_steps(spectra["step"].unique().tolist(), steps)
        drawings.append(
            Drawing(
                f"spectra{suffix}",
                f"Eigenvalues as shares of the variance, by rank. Later steps are darker; shares "
                f"below {figures_of_one_run.FLOOR:g} are not drawn. {about}",
                partial(figures_of_one_run.spectra, spectra, metrics, title, shown),
            )
        )
    return drawings


def _overview_names(n_layers: int) -> str:
    """`Spectral entropy SE, … before (pre) and after (post) the nonlinearity: …; JS by layer …`."""
    shown = shown_in("overview")
    *first, last = [f"{metric.title} {metric.short}" for metric in shown if metric.has_sites]
    maps = ", ".join(metric.short for metric in shown if not metric.has_sites)
    lines = f"{', '.join(first)} and {last}"
    return (
        f"{lines[0].upper()}{lines[1:]} before (pre) and after (post) the nonlinearity: mean ± SD "
        f"over {n_layers} layers, with the validation loss; {maps} by layer and step"
    )


def _training(metrics: pd.DataFrame, scalars: pd.DataFrame, run: pd.Series) -> Drawing:
    return Drawing(
        "training",
        "Losses and learning rate over steps. The unigram loss is that of a model that only knows "
        "the frequency of each token (or class). One run, one seed.",
        partial(
            figures_of_one_run.training,
            metrics,
            scalars,
            run["unigram_loss"],
            f"run {run['run_id']}, training",
        ),
    )


def _tables(
    run: pd.Series, metrics: pd.DataFrame, within: pd.DataFrame, runs: pd.DataFrame
) -> list[Table]:
    last = metrics[metrics["step"] == metrics["step"].max()]
    values = runs.T.iloc[:, 0]
    settings = pd.DataFrame(
        {"name": values.index.astype(str), "value": levels_of(values).to_list()}
    )
    shown = ("ffn", "metric", "window", "first_step", *RESULTS)
    shown_last = (*SIZES, *known(last, SHOWN), "status")
    return [
        Table("layers", "The last measured step, layer by layer.", last, shown_last),
        Table(
            "within",
            "Correlation of each metric (mean over layers) with the validation loss over the steps "
            "of this run: all measured steps, those after the warm-up, and the changes between "
            "consecutive steps, which a common trend does not affect. r_clock and r_lr: "
            "correlation of the loss with log(step + 1) and with the learning rate; given_: "
            "partial correlation given each of these, with its 95% interval.",
            within,
            shown,
        ),
        Table(
            "within_by_layer",
            "The same correlations for each layer.",
            correlate_within_runs(metrics, runs, by_layer=True),
            ("ffn", "layer", *shown[1:]),
        ),
        Table("run", "The complete record of the run.", settings),
    ]
