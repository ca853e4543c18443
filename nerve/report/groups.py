"""What a report on one run shows of groups of tokens, of sites, and of the error of sampling."""

from functools import partial

import pandas as pd

from nerve.analysis.sampling import sampling_error
from nerve.metric_names import GROUPS, SITES
from nerve.report import figures_of_groups
from nerve.report.content import Drawing, Table

_ABOUT = {
    "position": "0: the first position of each sequence; q1 to q4: four equal parts of the others. "
    "Compare 0 with like_0, which has as many of the others.",
    "frequency": "Thirds of all occurrences in the training text by how often the token occurs: "
    "head, the most frequent ones, mid and tail, at equal numbers of samples.",
    "halves": "Every other sequence: what differs between them is sampling.",
}

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
                f"Along the block at {step}, layer by layer: the residual stream before the FFN "
                "and its norm (stream_in), what the FFN gets (input), before and after the "
                "nonlinearity (pre, post), what the FFN gives (output), and the stream after it "
                "(stream_out). Their widths D differ, and with them the largest SE and PR. One "
                "run, one seed.",
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
                "What SE, PR and EEE come to with endlessly many samples, extrapolated from halves "
                "(_limit), with its standard error and 95% interval; n_effective: as many "
                "independent Gaussian samples differ as the halves do.",
                sampling_error(groups),
                _SHOWN,
            )
        )
    return tables
