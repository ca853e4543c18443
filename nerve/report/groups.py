"""The parts of a report about groups of tokens, sites, and (for one run) sampling error."""

from collections.abc import Sequence
from functools import partial

import pandas as pd

from nerve.analysis.groups import contrast_groups, pr_column
from nerve.analysis.sampling import sampling_error
from nerve.report import figures_of_groups
from nerve.report.content import Drawing, Table, known
from nerve.sites_and_groups import AROUND, GROUPINGS, POOLED, SITES

_ABOUT = {
    "position": "0: the first position of each sequence; q1 to q4: four equal parts of the "
    "remaining positions. Compare 0 with like_0, which has as many samples from other positions.",
    "frequency": "Thirds of all occurrences in the training text by the frequency of the token: "
    "head, the most frequent tokens, mid and tail, with equal numbers of samples.",
    "halves": "Alternate sequences, which differ only by sampling.",
}

_SITES = (
    "the residual stream before the FFN and its norm (stream_in), the input of the FFN (input), "
    "before and after the nonlinearity (pre, post), the output of the FFN (output), and the "
    "residual stream after it (stream_out). Their widths D differ, and so do the largest possible "
    "SE and PR."
)

_SHOWN = (
    *("layer", "ffn", "site", "sampling", "n_samples", "n_effective"),
    *(f"{name}{part}" for name in ("pr", "se") for part in ("", "_limit", "_low", "_high")),
)


def last_of(groups: pd.DataFrame) -> pd.DataFrame:
    """The rows of the last step with groups."""
    return groups[groups["step"] == groups["step"].max()] if len(groups) else groups


def group_drawings(ffn: str, groups: pd.DataFrame, run_id: str) -> list[Drawing]:
    """A figure for each grouping, and one for the sites along the block.

    Args:
        ffn: the FFN name.
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
        for grouping in GROUPINGS
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
    """All rows of one step, and the sampling error estimated from halves."""
    if groups.empty:
        return []
    tables = [
        Table(
            "groups",
            "Groups of tokens and sites along the block, at the last step with groups.",
            groups,
            in_page=False,
        )
    ]
    if (groups["grouping"] == "halves").any():
        tables.append(
            Table(
                "sampling",
                "SE, PR and EEE extrapolated from halves to infinitely many samples (_limit), with "
                "standard error and 95% interval; n_effective: the number of independent Gaussian "
                "samples whose halves would differ as much.",
                sampling_error(groups),
                _SHOWN,
            )
        )
    return tables


def drawings_by_factor(
    ffn: str, rows: pd.DataFrame, shown: Sequence[str], factors: Sequence[str], about: str
) -> list[Drawing]:
    """Figures of several runs: for each factor, one for each grouping and one for the sites.

    Args:
        ffn: the FFN name.
        rows: its rows of `pr_of_groups`.
        shown: the factors that have figures.
        factors: all factors that vary.
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
                    f"PR of groups of tokens by {grouping}, layer by layer at the last step with "
                    f"groups, by {factor}. {_ABOUT[grouping]} {about}",
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
                    f"PR along the block, layer by layer at the last step with sites, by "
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
    """Tables of several runs: their rows of `pr_of_groups`, and pairs of groups by design."""
    if rows.empty:
        return []
    tables = [
        Table(
            "groups",
            "PR of groups of tokens and sites along the block, by run and layer, at the last step "
            "with groups.",
            rows,
            in_page=False,
        )
    ]
    contrasts = contrast_groups(rows, factors)
    if len(contrasts):
        tables.append(
            Table(
                "group_contrasts",
                "The ratio of the PR of one group of tokens (group) to that of another (other): "
                "the geometric mean over layers, averaged over the seeds of a design (ratio_sd: "
                "sample SD over seeds), without flagged runs.",
                contrasts,
                (*(factors or ["design_id"]), *contrasts.columns[list(contrasts).index("ffn") :]),
            )
        )
    return tables
