"""What reports show of groups of tokens, of sites, and (of one run) of the error of sampling."""

from collections.abc import Sequence
from functools import partial

import pandas as pd

from nerve.analysis.groups import contrast_groups, pr_column
from nerve.analysis.sampling import sampling_error
from nerve.metric_names import AROUND, GROUPS, POOLED, SITES
from nerve.report import figures_of_groups
from nerve.report.content import Drawing, Table, known

_ABOUT = {
    "position": "0: the first position of each sequence; q1 to q4: four equal parts of the others. "
    "Compare 0 with like_0, which has as many of the others.",
    "frequency": "Thirds of all occurrences in the training text by how often the token occurs: "
    "head, the most frequent ones, mid and tail, at equal numbers of samples.",
    "halves": "Every other sequence: what differs between them is sampling.",
}

_SITES = (
    "the residual stream before the FFN and its norm (stream_in), what the FFN gets (input), "
    "before and after the nonlinearity (pre, post), what the FFN gives (output), and the stream "
    "after it (stream_out). Their widths D differ, and with them the largest SE and PR."
)

_SHOWN = (
    *("layer", "ffn", "site", "sampling", "n_samples", "n_effective"),
    *(f"{name}{part}" for name in ("pr", "se") for part in ("", "_limit", "_low", "_high")),
)


def last_of(groups: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last step that has groups."""
    return groups[groups["step"] == groups["step"].max()] if len(groups) else groups


def group_drawings(ffn: str, groups: pd.DataFrame, run_id: str) -> list[Drawing]:
    """A figure for each grouping, and one of the sites along the block.

    Args:
        ffn: which FFN of the layers.
        groups: its rows of `load_groups` at one step.
        run_id: for the titles.
    """
    if groups.empty:
        return []
    suffix, named = ("", "") if ffn == "ffn" else (f"_{ffn}", f", {ffn}")
    step = f"step {groups['step'].iloc[0]:,}"
    drawings = [
        Drawing(
            f"groups_{grouping}{suffix}",
            f"SE, PR and EEE of groups of tokens by {grouping}, layer by layer at {step}. "
            f"{_ABOUT[grouping]} One run, one seed.",
            partial(
                figures_of_groups.groups_by_depth,
                groups,
                grouping,
                f"run {run_id}{named}, {step}: by {grouping}",
            ),
        )
        for grouping in GROUPS
        if (groups["grouping"] == grouping).any()
    ]
    if not set(groups["site"]) <= {*SITES}:
        drawings.append(
            Drawing(
                f"sites{suffix}",
                f"Along the block at {step}, layer by layer: {_SITES} One run, one seed.",
                partial(
                    figures_of_groups.sites_by_depth,
                    groups,
                    f"run {run_id}{named}, {step}: along the block",
                ),
            )
        )
    return drawings


def group_tables(groups: pd.DataFrame) -> list[Table]:
    """All rows of one step, and what halves say of the error of sampling."""
    if groups.empty:
        return []
    tables = [
        Table(
            "groups",
            "Groups of tokens and sites along the block, at the last step that has them.",
            groups,
            in_page=False,
        )
    ]
    if (groups["grouping"] == "halves").any():
        tables.append(
            Table(
                "sampling",
                "SE, PR and EEE with infinitely many samples, extrapolated from halves (_limit), "
                "with standard error and 95% interval; n_effective: the number of independent "
                "Gaussian samples that would differ as the halves do.",
                sampling_error(groups),
                _SHOWN,
            )
        )
    return tables


def drawings_by_factor(
    ffn: str, rows: pd.DataFrame, shown: Sequence[str], factors: Sequence[str], about: str
) -> list[Drawing]:
    """Of several runs, by each factor: a figure for each grouping, and one of the sites.

    Args:
        ffn: which FFN of the layers.
        rows: its rows of `pr_of_groups`.
        shown: the factors that have figures.
        factors: all that vary.
        about: the end of each caption.
    """
    suffix, named = ("", "") if ffn == "ffn" else (f"_{ffn}", f", {ffn}")
    drawings = []
    for factor in shown:
        others = [name for name in factors if name != factor]
        for grouping, compared in figures_of_groups.COMPARED.items():
            if not known(rows, [pr_column(SITES[0], *compared[0])]):
                continue
            drawings.append(
                Drawing(
                    f"groups_{grouping}{suffix}_by_{factor}",
                    f"PR of groups of tokens by {grouping}, layer by layer at the last step that "
                    f"has groups, by {factor}. {_ABOUT[grouping]} {about}",
                    partial(
                        figures_of_groups.groups_by_factor,
                        rows,
                        grouping,
                        factor,
                        others,
                        f"Groups by {grouping}, by {factor}{named}",
                    ),
                )
            )
        if known(rows, [pr_column(site, POOLED) for site in AROUND]):
            drawings.append(
                Drawing(
                    f"sites{suffix}_by_{factor}",
                    f"PR along the block, layer by layer at the last step that has sites, by "
                    f"{factor}: {_SITES} {about}",
                    partial(
                        figures_of_groups.sites_by_factor,
                        rows,
                        factor,
                        others,
                        f"Along the block by {factor}{named}",
                    ),
                )
            )
    return drawings


def tables_by_factor(rows: pd.DataFrame, factors: Sequence[str]) -> list[Table]:
    """Of several runs, given their rows of `pr_of_groups`: these, and pairs of groups by design."""
    if rows.empty:
        return []
    tables = [
        Table(
            "groups",
            "PR of groups of tokens and sites along the block, run by run and layer by layer, at "
            "the last step that has them.",
            rows,
            in_page=False,
        )
    ]
    contrasts = contrast_groups(rows, factors)
    if len(contrasts):
        tables.append(
            Table(
                "group_contrasts",
                "How many times the PR of another group (other) one group of tokens has: the "
                "geometric mean over layers, averaged over the seeds of a design (ratio_sd: sample "
                "SD over seeds), without flagged runs.",
                contrasts,
                (*(factors or ["design_id"]), *contrasts.columns[list(contrasts).index("ffn") :]),
            )
        )
    return tables
