"""study/criteria.md: the rule, the core checks, and what they say on the runs at hand."""

from collections.abc import Sequence

from claims import CLAIMS
from page import markdown
from verdicts import interval, of_claim, outcome
from wording import MISSING, number

from criteria import CHECKS, OURS
from criteria.check import COMMITTED, CoreCheck, Judged
from criteria.nulls import ALL_UP_TO, CHANCE, N_PERMUTATIONS
from criteria.ours import TITLES
from nerve.analysis.estimate import LEAST_DF
from nerve.analysis.statistics import LEVEL

RULE = f"""\
# How the paper's claims are judged

Written by `python study/scorecard`; the code in `scorecard/criteria` is the rule, this page is
what it prints. It was fixed on {COMMITTED:%Y-%m-%d}, before any run that it judges. What runs say
that began before {COMMITTED:%Y-%m-%d %H:%M} UTC is *exploratory*: the checks were written by
people who had seen them.

## The rule

**Effect.** A core check computes one number from runs, positive in the direction that the claim
says. *nats* are differences of losses or of natural logarithms (.1 is 10%). Runs are averaged
over layers as the effect says, and compared at their last step unless it says otherwise. Runs
that are flagged (untrained, diverged, failed) are left out; corpora and sizes are never pooled.

**Interval.** {LEVEL:.0%}. Of differences between designs: values = design + seed + error by least
squares, so that runs are paired by seed (the same initialization and order of data); the error is
pooled over all designs of the comparison, its degrees of freedom (df) are said, and t is
Student's. With two designs this is the paired t interval. Of the mean of one design: the error is
that of the seeds, pooled over designs. Of correlations over runs or designs: Fisher's z. Where
several differences must hold, that with the lowest bound stands for all.

**Outcome of a check.** `holds`: the interval lies above the smallest effect of interest (0 unless
stated). `opposite`: it lies below 0. `within noise`: neither, and what the check asks for is
there. `undecided`: seeds, runs or scale that it asks for are missing, or less than {LEAST_DF} df.
*Reads* is what the interval says by itself, whatever is missing.

**Changed since.** On 2026-11-27, after the runs that `15.runs` judges: both checks of claim 15 also
ask that the cost be seen, so that permuted labels can test them. This can only take outcomes away.
The same day, with one run of ten of row 6a there: a check goes to the first of its folders that
has all it asks for, where before the first run of a new row took the place of runs that had all.

**Null models.** Each check is computed again on spectra in which there is nothing to find; losses
stay as they are. *untrained*: every step has the spectra of step 0. *clock*: every metric is 1 +
log(step + 1), or falls as this rises. *identity*: post is pre, JS is 0. *permuted labels*: the
designs go to other runs (up to {ALL_UP_TO} runs all orders, else {N_PERMUTATIONS}; orders that
only rename designs left out), or the steps of each run, its layers, the spectra of designs
against their losses, or what was measured and what was not; passed where the check holds in more
than {CHANCE:.0%} of them. A null that changes nothing that a check looks at does not test it:
losses and times meet the permutation only. A check that holds on a null is stored with
`passes_null`; it cannot make its claim hold.

**Outcome of a claim.** `holds`: all core checks hold and none passes a null. `does not hold`: one
is opposite, or within noise with all that it asks for. Else `cannot be told here`.
"""


def page(judged: Sequence[Judged]) -> str:
    """The text of study/criteria.md."""
    parts = [
        RULE,
        "## The core checks\n",
        markdown(
            ["check", "what must hold", "effect", "least", "asks for", "permutes", "paper"],
            [_asked(check) for check in (*CHECKS, *OURS)],
        ),
        "\nWhy this effect and not another:\n",
        *(f"- `{check.id}`: {check.why}" for check in (*CHECKS, *OURS) if check.why),
        f"\n{len(CHECKS)} checks at {LEVEL:.0%}: were nothing there, chance would let about "
        f"{len(CHECKS) * 0.025:.1f} hold and as many be opposite.\n",
        "## The claims on the runs at hand\n",
        *(f"{claim.number}. {_claim(judged, claim.number)}" for claim in CLAIMS),
        "\nOf our own; the readings are older than the runs, the checks are not:\n",
        *(f"- {number}. {title}: {_claim(judged, number)}" for number, title in TITLES.items()),
        "\n## The checks on the runs at hand\n",
        markdown(
            ["check", "runs", "scale", "effect", "df", "reads", "outcome", "passes_null"],
            [_found(each) for each in judged],
        ),
    ]
    return "\n".join(parts) + "\n"


def _asked(check: CoreCheck) -> Sequence[str]:
    least = number(check.smallest, 2) if check.smallest else "0"
    asks = f"{check.seeds} {check.unit}; {check.scale}"
    return [f"`{check.id}`", check.states, check.effect, least, asks, check.labels, check.paper]


def _claim(judged: Sequence[Judged], claim: int) -> str:
    own = of_claim(judged, claim)
    said = []
    for each in own:
        passed = f", passes_null: {', '.join(each.passes_null)}" if each.passes_null else ""
        lacks = f" for want of {', '.join(each.missing)}" if each.missing else ""
        said.append(f"`{each.check.id}` {each.outcome}{lacks}{passed}")
    mark = " (exploratory)" if any(each.exploratory for each in own) else ""
    return f"**{outcome(own)}**{mark}: {'; '.join(said)}"


def _found(each: Judged) -> Sequence[str]:
    if each.estimate is None:
        return [f"`{each.check.id}`", *[MISSING] * 5, each.outcome, MISSING]
    mark = ", exploratory" if each.exploratory else ""
    return [
        f"`{each.check.id}`",
        f"{each.source}, {each.estimate.n_seeds} {each.check.unit}",
        MISSING if each.runs is None else _scale(each),
        interval(each.estimate),
        str(each.estimate.df),
        f"{each.reading or MISSING}{mark}",
        each.outcome,
        ", ".join(each.passes_null) or MISSING,
    ]


def _scale(each: Judged) -> str:
    assert each.runs is not None
    runs = each.runs.runs
    size = f"{runs['model.n_layers'].min():.0f} × {runs['model.d_model'].min():.0f}"
    return f"{size}, {each.runs.steps[-1]:,} steps"
