"""The generated blocks of study/findings.md (the scorecard, verdict and tables of each claim, the
runs), and the list of all runs.

A block lies between `<!-- name -->` and `<!-- end -->`; all other text is written by hand.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from claims import CLAIMS, long_runs
from criteria.check import Judged
from evidence import Evidence, Sweep, span
from judgement import Claim, Finding, Table
from verdicts import first_line, of_claim, over_scales, scorecard
from wording import MISSING, number, percent

from nerve.analysis.factors import find_factors, level_text

PACKAGES = ("torch", "lightning")


def blocks(evidence: Evidence, judged: Sequence[Judged]) -> dict[str, str]:
    """The text of every block by its name: `scorecard`, `verdict 1` to 18, `claim 1` to those of
    claim 15, `long runs`, `scales`, `runs`."""
    return {
        "scorecard": _scorecard(judged),
        **{
            f"verdict {number}": first_line(of_claim(judged, number))
            for number in sorted({each.check.claim for each in judged})
        },
        **{f"claim {claim.number}": _beside(claim, claim.find(evidence)) for claim in CLAIMS},
        "long runs": folded("Tables", "\n\n".join(map(_titled, long_runs.tables(evidence)))),
        "scales": markdown(*over_scales(evidence)),
        "runs": folded("The sweeps, and the flagged runs", _runs(evidence)),
    }


def fill(text: str, contents: Mapping[str, str]) -> str:
    """`text` with the content of each block inserted between its marks.

    Raises:
        ValueError: if the text does not have the marks of a block exactly once.
    """
    for name, content in contents.items():
        # There must be no other mark in between, because the block of that mark would be lost.
        marks = re.compile(rf"(<!-- {name} -->\n)(?:(?!<!-- ).)*(<!-- end -->)", re.DOTALL)
        found = list(marks.finditer(text))
        if len(found) != 1:
            raise ValueError(
                f"The page needs the marks <!-- {name} --> and <!-- end --> once, each on a line "
                f"of its own; it has them {len(found)} times."
            )
        before, after = found[0].end(1), found[0].start(2)
        text = f"{text[:before]}\n{content}\n\n{text[after:]}"
    return text


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def folded(summary: str, content: str) -> str:
    """A fold, which the reader opens."""
    return f"<details><summary>{summary}</summary>\n\n{content}\n\n</details>"


def _scorecard(judged: Sequence[Judged]) -> str:
    links = {claim: f"#{anchor(claim)}" for claim in CLAIMS}
    header = ["#", "claim", "", "ours", "paper", "effect", "trained on"]
    return markdown(header, scorecard(judged, links))


def heading(claim: Claim) -> str:
    """The title of a claim's section."""
    return f"Claim {claim.number}: {claim.statement}"


def anchor(claim: Claim) -> str:
    """The anchor of a heading: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading(claim).lower()).replace(" ", "-")


def _beside(claim: Claim, finding: Finding) -> str:
    if not finding.checks and not finding.tables:
        return "Not run."
    rows = [(check.criterion, check.paper, check.measured, check.holds) for check in finding.checks]
    header = ["criterion", "paper", "measured", "holds"]
    parts = [
        f"{finding.scale}; seeds: {finding.seeds}.",
        f"Measured: {finding.measured}.",
        f"The paper: {claim.paper}.",
    ]
    if rows:
        parts.append(f"Criteria from before the rule:\n\n{markdown(header, rows)}")
    parts += [_titled(table) for table in finding.tables if table.rows]
    return folded(f"Tables: {finding.scale}", "\n\n".join(parts))


def _titled(table: Table) -> str:
    return f"{table.title}:\n\n{markdown(table.header, table.rows)}"


def _runs(evidence: Evidence) -> str:
    sweeps = {name: evidence.sweep(name) for name in evidence.names}
    header = [
        "sweep",
        "runs",
        "flagged",
        "steps",
        "tokens per run",
        "tokens in all",
        "wall time",
        "tokens/s",
    ]
    header += ["training, summed", "measuring", "parameters", "device", "versions", "commit"]
    table = markdown(header, [[name, *_about(sweep)] for name, sweep in sweeps.items()])
    note = (
        "A Mixer's tokens are images. Wall time: the time in which at least one run of the sweep "
        "was active, mostly next to runs of other sweeps; tokens/s: of all runs in that time. "
        "Measuring, including validation, is a share of the training time. A + after a commit "
        "means uncommitted changes."
    )
    flagged = [line for name, sweep in sweeps.items() for line in _flagged(name, sweep)]
    listed = "\n".join(flagged) or "No run is flagged."
    return f"{table}\n\n{note}\n\nFlagged runs, which are excluded from all means:\n\n{listed}"


def each_run(evidence: Evidence) -> str:
    """The page with one row per run: design, how it ended, speed, share of measuring."""
    rows = [row for name in evidence.names for row in _each(name, evidence.sweep(name))]
    header = ["sweep", "directory", "design", "loss", "flag", "steps", "tokens/s", "measuring"]
    return (
        "# Every run of the study\n\n"
        "Written by `python study/scorecard` from `runs/`; the results are in "
        "[findings.md](findings.md). Runs of a sweep shared a machine, so tokens/s (for a Mixer, "
        "images/s) is a run's share of it; measuring includes validation.\n\n"
        f"{markdown(header, rows)}\n"
    )


def _each(name: str, sweep: Sweep) -> list[list[str]]:
    tokens = sweep.metrics.groupby("run_id", observed=True)["tokens_seen"].max()
    flags = sweep.flags.set_index("run_id")
    varying = _varying(sweep)
    rows = []
    for _, run in sweep.runs.iterrows():
        flag, seconds = flags.loc[run["run_id"]], run.get("final.train_seconds", np.nan)
        share = run.get("final.measuring_seconds", np.nan) / seconds
        rows.append(
            [
                name,
                Path(run["directory"]).name,
                _design(run, varying),
                number(flag["final_loss"], 4),
                flag["flag"],
                f"{run['step']:,}",
                number(tokens.get(run["run_id"], 0) / seconds),
                percent(share) if np.isfinite(share) else MISSING,
            ]
        )
    return sorted(rows, key=lambda row: row[2])


def _varying(sweep: Sweep) -> list[str]:
    """The factors that distinguish the runs of a sweep."""
    return [*find_factors(sweep.runs).varying, "seed"]


def _design(run: pd.Series, varying: Sequence[str]) -> str:
    """The values of these factors for a run."""
    return ", ".join(f"{factor} {level_text(run[factor])}" for factor in varying)


def _about(sweep: Sweep) -> list[str]:
    runs = sweep.runs
    tokens = sweep.metrics.groupby("run_id", observed=True)["tokens_seen"].max()
    at_work = seconds_at_work(runs["started"], runs["ended"])
    training, measuring = (
        runs[f"final.{name}_seconds"].sum() if f"final.{name}_seconds" in runs else 0.0
        for name in ("train", "measuring")
    )
    versions = [f"Python {_values(runs, 'versions.python')}"]
    versions += [f"{name} {_values(runs, f'versions.{name}')}" for name in PACKAGES]
    commits = runs["git_commit"].dropna().map(lambda text: text[:7] + "+" * text.endswith("+"))
    return [
        str(len(runs)),
        str((sweep.flags["flag"] != "ok").sum()),
        span(runs["step"]),
        span(tokens) if len(tokens) else MISSING,
        f"{tokens.sum():,}",
        _duration(at_work),
        f"{tokens.sum() / at_work:,.0f}" if at_work else MISSING,
        _duration(training),
        percent(measuring / training) if training else MISSING,
        span(runs["n_parameters"]),
        _values(runs, "device"),
        ", ".join(versions),
        ", ".join(sorted(set(commits))) or MISSING,
    ]


def seconds_at_work(started: pd.Series, ended: pd.Series) -> float:
    """The time in which at least one run was active, in seconds."""
    spans = pd.DataFrame({"start": started, "end": ended}).dropna().sort_values("start")
    before = spans["end"].cummax().shift()
    start = spans["start"].where(before.isna() | (spans["start"] > before), before)
    return float((spans["end"] - start).dt.total_seconds().clip(lower=0).sum())


def _flagged(name: str, sweep: Sweep) -> list[str]:
    flags = sweep.flags[sweep.flags["flag"] != "ok"]
    varying = _varying(sweep) if len(flags) else []
    rows = sweep.runs.set_index("run_id").loc[flags["run_id"]]
    return [
        f"- {name}: {_design(run, varying)}: {flag['flag']}. {flag['reason']}"
        for (_, run), (_, flag) in zip(rows.iterrows(), flags.iterrows(), strict=True)
    ]


def _values(runs: pd.DataFrame, name: str) -> str:
    """The different values of a column."""
    values = set(runs[name].dropna().map(str)) if name in runs else set()
    return ", ".join(sorted(values)) or MISSING


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
