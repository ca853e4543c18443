"""Claim 15: what measuring costs."""

from evidence import Evidence
from judgement import Finding, Table
from wording import percent


def overhead(evidence: Evidence) -> Finding:
    """Claim 15: the share of the training time that measuring took in the runs of the study."""
    rows, found = [], []
    for name in evidence.names:
        sweep = evidence.sweep(name)
        runs = sweep.runs[sweep.runs["run_id"].isin(sweep.ok["run_id"])]
        if len(runs):
            shares = runs["final.measuring_seconds"] / runs["final.train_seconds"]
            found += shares.tolist()
            rows.append(
                [
                    name,
                    ", ".join(f"{steps:g}" for steps in sorted(set(runs["monitor.every_n_steps"]))),
                    f"{percent(shares.min())} to {percent(shares.max())}",
                ]
            )
    table = Table(
        "In the runs of this study: measuring and validating as a share of the training time, "
        "lowest to highest run",
        ["sweep", "measured at every … steps", "share"],
        rows,
    )
    low, high = (percent(end) for end in (min(found), max(found)))
    return Finding(f"{low} to {high} of the training time", "all sweeps", "all", [], [table])
