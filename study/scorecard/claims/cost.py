"""Claim 15: what measuring costs."""

from evidence import Evidence
from judgement import Check, Finding, Table, outcome
from wording import percent

STALL_STEPS = 0.97
"""Steps of training that one measurement takes, GPT-2 125M at 65,536 tokens per step on one H200.

From `python benchmarks/monitor.py`; see benchmarks/README.md.
"""

LIMIT = 0.01


def overhead(evidence: Evidence) -> Finding:
    """Claim 15: the share of training that measuring takes at every 1000 steps."""
    share = STALL_STEPS / 1000
    measured = f"{share:.3%}, at every 100 steps {10 * share:.2%} (benchmarks/README.md)"
    check = Check(
        f"measuring at every 1000 steps takes ≤ {LIMIT:.0%} of the training time",
        "about 1% (RTX 3090)",
        measured,
        outcome(share <= LIMIT),
    )
    rows = []
    for name in evidence.names:
        sweep = evidence.sweep(name)
        runs = sweep.runs[sweep.runs["run_id"].isin(sweep.ok["run_id"])]
        if len(runs):
            shares = runs["final.measuring_seconds"] / runs["final.train_seconds"]
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
    return Finding(measured, "GPT-2 125M, one H200", "–", [check], [table])
