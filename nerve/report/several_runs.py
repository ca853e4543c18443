"""The content of a report on several runs: the factors that vary, and how the runs compare.

Figures and statistics use the runs that can be compared (flag `ok`); the others are named with the
reason, and appear in the table of runs. Figures of single runs are only in the report on a single
run directory.
"""

from collections.abc import Sequence
from functools import partial

import pandas as pd

from nerve.analysis.compare import final_metrics
from nerve.analysis.depth import depth_means, metrics_by_depth
from nerve.analysis.factors import (
    Factors,
    describe_ties,
    find_factors,
    level_text,
    levels_of,
    ordered_levels,
)
from nerve.analysis.frames import at_last_step
from nerve.analysis.groups import pr_of_groups
from nerve.analysis.load import Runs
from nerve.report import figures_of_several_runs
from nerve.report.comparisons import Comparisons, comparison_drawings
from nerve.report.content import (
    Content,
    Drawing,
    dead_layers,
    limits,
    outlying_rows,
    sampled_rows,
    seeds,
)
from nerve.report.groups import drawings_by_factor, tables_by_factor
from nerve.report.style import one_line, short_name
from nerve.report.tables import comparison_tables
from nerve.storage.find import listed

MAX_FACTORS = 6
MAX_NAMES = 12
"""A factor whose levels are names has no figures beyond this many levels, because their colors
could not be distinguished."""


def content_of_runs(loaded: Runs, window: str, title: str) -> Content:
    """Figures and tables of two or more runs.

    Args:
        loaded: the runs.
        window: the window that the summary of correlations within runs shows first, one of
            `WINDOWS`.
        title: title of the page.
    """
    runs, metrics, flags = loaded.frame, loaded.metrics, loaded.flags
    is_ok = (flags["flag"] == "ok").to_numpy()
    factors = find_factors(runs[is_ok] if is_ok.any() else runs)
    points = final_metrics(metrics, runs, factors.varying)
    compared = Comparisons(loaded, points, factors)
    designs = compared.designs
    content = Content(title=title, facts=_facts(runs, flags, factors))
    content.notes += [*_flagged(flags), *dead_layers(metrics), *outlying_rows(metrics)]
    content.notes += sampled_rows(metrics)
    content.notes += describe_ties(factors)
    if not factors.varying and not factors.taken:
        only = "Only the seed" if runs["seed"].nunique() > 1 else "Nothing"
        content.notes.append(f"{only} varies among these runs.")
    content.notes += _single_seeds(designs)
    drawn = flags.loc[flags["flag"] == "ok", "run_id"]
    if drawn.empty and len(metrics):
        drawn = flags["run_id"]
        content.notes.append(
            "No run can be compared, so figures show the flagged ones, and statistics are omitted."
        )
    shown_runs = runs[runs["run_id"].isin(drawn)]
    grouped = None
    if len(loaded.groups):
        grouped = pr_of_groups(metrics, loaded.groups, shown_runs, factors.varying)
    content.drawings += _drawings(metrics, grouped, shown_runs, compared)
    shown = _drawn_factors(runs, factors)
    content.drawings += comparison_drawings(compared, window, shown)
    hidden = [name for name in factors.varying if name not in shown]
    if hidden:
        content.notes.append(
            f"There are no figures by {', '.join(hidden)}: only the first {MAX_FACTORS} factors "
            f"whose levels are numbers or at most {MAX_NAMES} names have figures. The tables "
            "include all factors."
        )
    content.tables += comparison_tables(compared, window)
    if grouped is not None:
        content.tables += tables_by_factor(grouped, factors.varying)
    return content


def _facts(runs: pd.DataFrame, flags: pd.DataFrame, factors: Factors) -> list[tuple[str, str]]:
    counts = flags["flag"].value_counts()
    facts = [
        ("runs", ", ".join(f"{n:,} {flag}" for flag, n in counts.items())),
        ("designs", f"{runs['design_id'].nunique():,} (runs that differ only in the seed)"),
    ]
    for name in factors.varying:
        levels = [one_line(level_text(level)) for level in ordered_levels(runs[name])]
        more = f", … ({len(levels)} levels)" if len(levels) > MAX_NAMES else ""
        facts.append((name, ", ".join(levels[:MAX_NAMES]) + more))
    if factors.constant:
        values = ", ".join(f"{name} = {value}" for name, value in factors.constant.items())
        facts.append(("the same in all runs", values))
    return facts


def _flagged(flags: pd.DataFrame) -> list[str]:
    """One sentence per flag with the first of its runs; the table of runs has all reasons."""
    bad = flags[flags["flag"] != "ok"]
    return [
        f"{len(rows)} of {len(flags)} runs are flagged “{flag}” and excluded from figures and "
        "statistics: "
        f"{listed(list(rows['run_id']))}. {'' if rows['reason'].nunique() == 1 else 'The first: '}"
        f"{rows['reason'].iloc[0]}"
        for flag, rows in bad.groupby("flag", sort=False)
    ]


def _single_seeds(designs: pd.DataFrame) -> list[str]:
    counts = designs.groupby("design_id")["n_seeds"].max()
    n_single, n_known = int((counts == 1).sum()), int((counts > 0).sum())
    if not n_single:
        return []
    which = "Every design has" if n_single == n_known else f"{n_single} of {n_known} designs have"
    return [f"{which} only one seed, and therefore no intervals over seeds."]


def _drawn_factors(runs: pd.DataFrame, factors: Factors) -> list[str]:
    """The factors that have figures."""
    suited = [
        name
        for name in factors.varying
        if pd.api.types.is_numeric_dtype(runs[name].infer_objects())
        or runs[name].astype(str).nunique() <= MAX_NAMES
    ]
    return suited[:MAX_FACTORS]


def _drawings(
    metrics: pd.DataFrame, grouped: pd.DataFrame | None, runs: pd.DataFrame, compared: Comparisons
) -> list[Drawing]:
    factors, designs = compared.factors, compared.designs
    is_drawn = metrics["run_id"].isin(runs["run_id"])
    rows = metrics if is_drawn.all() else metrics[is_drawn]
    if rows.empty:
        return []
    names = [name for name in figures_of_several_runs.CURVES if name != "val_loss"]
    means = depth_means(rows, runs, factors.varying, names=names, regions=["all"])
    layers = metrics_by_depth(
        at_last_step(rows), runs, factors.varying, names=figures_of_several_runs.LAYERS
    )
    shown = _drawn_factors(runs, factors)
    if not factors.varying:
        # Only seeds differ: each run is a separate line.
        shown = ["seed"] if runs["seed"].nunique() > 1 else ["run_id"]
        means, layers = (frame.assign(design_id=frame["run_id"]) for frame in (means, layers))
        grouped = None if grouped is None else grouped.assign(design_id=grouped["run_id"])
    drawings = []
    for ffn in means["ffn"].unique():
        own = [frame[frame["ffn"] == ffn] for frame in (means, layers, designs, rows)]
        its_means, _, its_designs, its_rows = own
        # If there are Mixers and GPTs, a factor may have only one level in one of them.
        varied = [name for name in shown if levels_of(its_means[name]).nunique() > 1] or shown[:1]
        across = compared.across_designs
        across = across[across["ffn"] == ffn]
        drawings += _factor_drawings(str(ffn), *own, shown=varied, factors=factors)
        drawings += _loss_drawings(str(ffn), its_means, its_designs, its_rows, across, varied)
        if grouped is not None:
            its_groups = grouped[grouped["ffn"] == ffn]
            about = f"{seeds(its_designs)} {_lines(its_means)}"
            drawings += drawings_by_factor(str(ffn), its_groups, varied, factors.varying, about)
    return drawings


def _factor_drawings(
    ffn: str,
    means: pd.DataFrame,
    layers: pd.DataFrame,
    designs: pd.DataFrame,
    metrics: pd.DataFrame,
    *,
    shown: Sequence[str],
    factors: Factors,
) -> list[Drawing]:
    about = f"{limits(metrics)} {seeds(designs)} {_lines(means)}"
    columns = figures_of_several_runs.LAYERS  # older runs have not stored all of them
    columns = tuple(name for name in columns if layers[name].notna().any()) or columns
    drawings = []
    for factor in shown:
        others = [name for name in factors.varying if name != factor]
        drawings += [
            Drawing(
                f"curves{_suffix(ffn)}_by_{factor}",
                f"Validation loss and metrics (means over layers) over steps, by {factor}. {about}",
                partial(
                    figures_of_several_runs.curves_by_factor,
                    means,
                    factor,
                    others,
                    f"Training by {factor}{_named(ffn)}",
                ),
            ),
            Drawing(
                f"layers{_suffix(ffn)}_by_{factor}",
                f"The last measured step, layer by layer, by {factor}: "
                f"{', '.join(map(short_name, columns))}. {about}",
                partial(
                    figures_of_several_runs.layers_by_factor,
                    layers,
                    factor,
                    others,
                    f"Last step by {factor}{_named(ffn)}",
                    columns,
                ),
            ),
        ]
    return drawings


def _loss_drawings(
    ffn: str,
    means: pd.DataFrame,
    designs: pd.DataFrame,
    metrics: pd.DataFrame,
    across: pd.DataFrame,
    shown: Sequence[str],
) -> list[Drawing]:
    """Loss against metrics, one figure per `data` with two or more designs, because losses on
    different data are not comparable."""
    drawings = []
    compared = designs[designs["n_seeds"] > 0]
    for i, (data, points) in enumerate(compared.groupby("data", dropna=False, sort=False)):
        if len(points) < 2:
            continue  # one point shows no relation
        which = ""
        if compared["data"].nunique(dropna=False) > 1:
            which = ", data " + ("unknown" if pd.isna(data) else str(data))
        same_data, same_group = (
            frame["data"].isna() if pd.isna(data) else frame["data"] == data
            for frame in (means, across)
        )
        own = metrics[metrics["run_id"].isin(means.loc[same_data, "run_id"])]
        color = shown[0] if shown and shown[0] in points.columns else None
        drawings.append(
            Drawing(
                f"loss{_suffix(ffn)}" + (f"_{i}" if which else ""),
                f"Final validation loss against the metrics at the last measured step{which}. One "
                "point per design: mean over its seeds, bars ± SD (of up to "
                f"{figures_of_several_runs.MAX_LINES} designs). r: Pearson with its 95% interval "
                f"(Fisher), ρ: Spearman, n: designs. {limits(own)} {seeds(points)}",
                partial(
                    figures_of_several_runs.loss_against_metrics,
                    points,
                    across[same_group],
                    color,
                    f"Loss against metrics{_named(ffn)}{which}",
                ),
            )
        )
    return drawings


def _suffix(ffn: str) -> str:
    """The suffix of a figure's name for its FFN, if there are several kinds."""
    return "" if ffn == "ffn" else f"_{ffn}"


def _named(ffn: str) -> str:
    """The same for a figure's title."""
    return "" if ffn == "ffn" else f", {ffn}"


def _lines(means: pd.DataFrame) -> str:
    if means["design_id"].nunique() > figures_of_several_runs.MAX_LINES:
        return (
            "Lines: median over the designs of a level on the same data, at the steps or layers "
            "where most of them were measured; bands (with up to "
            f"{figures_of_several_runs.MAX_LINES} lines): 10th to 90th percentile."
        )
    return "Lines: mean over the seeds of a design; bands: lowest to highest."
