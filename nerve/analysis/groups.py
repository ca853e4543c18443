"""Compares the PR of groups of tokens and of sites over layers and designs."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from nerve.analysis.depth import metrics_by_depth
from nerve.analysis.frames import at_last_step, require_columns, require_free, require_names
from nerve.sites_and_groups import SITES

ROW = ["run_id", "step", "layer", "ffn"]

CONTRASTS = {"position": (("0", "like_0"), ("q4", "q1")), "frequency": (("tail", "head"),)}
"""Pairs of groups of a grouping with equal numbers of samples, whose PR is compared."""


def pr_column(site: str, group: str, other: str | None = None) -> str:
    """The column of `pr_of_groups` for a site's group, or for its ratio to another group's."""
    return f"pr_{site}_{group}" if other is None else f"pr_{site}_{group}_to_{other}"


def pr_of_groups(
    metrics: pd.DataFrame, groups: pd.DataFrame, runs: pd.DataFrame, factors: Sequence[str] = ()
) -> pd.DataFrame:
    """One row per run, FFN name and layer, at the last step of each run that has groups.

    Columns: those of `metrics_by_depth`, the PR of each site and group, such as `pr_post_tail` and
    `pr_output_all` (of all samples), and the ratios in `CONTRASTS`, such as `pr_post_tail_to_head`.

    Args:
        metrics: rows of `load_metrics`.
        groups: rows of `load_groups`.
        runs: rows of `load_runs`; rows of other runs are ignored.
        factors: columns of `runs` to keep.

    Raises:
        ConfigError: for frames without these columns, or a factor that is not a column.
    """
    require_columns(groups, [*ROW, "site", "group", "pr"], "load_groups")
    last = at_last_step(groups)
    wide = last.pivot(index=ROW, columns=["site", "group"], values="pr")
    wide.columns = wide.columns.map(lambda pair: pr_column(*pair))
    for _, site, group, other in contrasts():
        above, below = (pr_column(site, each) for each in (group, other))
        if above in wide and below in wide:
            wide[pr_column(site, group, other)] = wide[above] / wide[below]
    steps = last.groupby("run_id", observed=True)["step"].first()
    own = metrics[metrics["run_id"].isin(steps.index)]  # all steps, because flags depend on them
    merged = own.merge(wide.reset_index(), on=ROW, how="left")
    rows = metrics_by_depth(merged, runs, factors, names=list(wide.columns))
    return rows[rows["step"] == rows["run_id"].astype(object).map(steps)].reset_index(drop=True)


def contrast_groups(rows: pd.DataFrame, factors: Sequence[str] = ()) -> pd.DataFrame:
    """One row per design, FFN name, site and pair of groups: the ratio of their PR, averaged over
    layers and seeds. Flagged runs are left out.

    Columns: `design_id, data`, the `factors`, `ffn, site, grouping, group, other, n_seeds`;
    `pr_group, pr_other`: means over layers and seeds; `ratio`: the geometric mean over layers of PR
    of `group` divided by PR of `other`, averaged over seeds; `ratio_sd`: its sample SD over seeds,
    missing with fewer than two.

    Args:
        rows: rows of `pr_of_groups`.
        factors: columns of `rows`, the same for all seeds of a design.

    Raises:
        ConfigError: for a factor that is not a column of `rows`, or is one of the result's.
    """
    require_names(factors=factors)
    added = ["site", "grouping", "group", "other", "n_seeds", "pr_group", "pr_other"]
    added += ["ratio", "ratio_sd"]
    keys = ["design_id", "data", *factors, "ffn"]
    require_columns(rows, [*keys, "run_id", "flag"], "pr_of_groups")
    require_free(factors, added)
    rows = rows[rows["flag"] == "ok"]
    tables = [pd.DataFrame(columns=[*keys, *added])]
    for grouping, site, group, other in contrasts():
        ratio = pr_column(site, group, other)
        if ratio not in rows:
            continue
        values = rows[[*keys, "run_id"]].assign(
            pr_group=rows[pr_column(site, group)],
            pr_other=rows[pr_column(site, other)],
            ratio=np.log(rows[ratio]),
        )
        table = _over_seeds(values.dropna(subset=["ratio"]), keys)
        named = {"site": site, "grouping": grouping, "group": group, "other": other}
        for place, (name, value) in enumerate(named.items(), len(keys)):
            table.insert(place, name, value)
        tables.append(table)
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


def contrasts() -> Iterator[tuple[str, str, str, str]]:
    """Each grouping, site, group and other group whose PR are compared."""
    for grouping, pairs in CONTRASTS.items():
        for site in SITES:
            for group, other in pairs:
                yield grouping, site, group, other


def _over_seeds(values: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Means over the layers of each run (of the log ratio), then over runs."""
    runs = values.groupby([*keys, "run_id"], sort=False, dropna=False, observed=True).mean()
    runs["ratio"] = np.exp(runs["ratio"])
    designs = runs.groupby([*keys], sort=False, dropna=False, observed=True)
    means = designs.mean()
    means.insert(0, "n_seeds", designs.size())
    return means.assign(ratio_sd=designs["ratio"].std()).reset_index()
