"""Writes study/criteria.md: the rule, the core checks, and their outcomes on the available runs."""

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

Written by `python study/scorecard`; the code in `scorecard/criteria` is the rule, and this page is
its output. The rule was fixed on {COMMITTED:%Y-%m-%d}, before any run that it judges. Results of
runs that began before {COMMITTED:%Y-%m-%d %H:%M} UTC are *exploratory*, because the authors of the
checks had seen them.

## The rule

**Effect.** A core check computes one number from runs, which is positive in the direction of the
claim. *nats* are differences of losses or of natural logarithms (.1 is 10%). Values are averaged
over layers as the effect says, and runs are compared at their last step unless it says otherwise.
Flagged runs (untrained, diverged, failed) are excluded; corpora and sizes are never pooled.

**Interval.** {LEVEL:.0%}. For differences between designs, the model is values = design + seed +
error, fitted by least squares, so that runs are paired by seed (the same initialization and order
of data). The error is pooled over all designs of the comparison, its degrees of freedom (df) are
stated, and the interval is Student's t; with two designs it is the paired t interval. For the mean
of one design, the error is that of the seeds, pooled over designs. For correlations over runs or
designs, it is Fisher's z. If several differences must hold, the one with the lowest bound counts.

**Outcome of a check.** `holds`: the interval lies above the smallest effect of interest (0 unless
stated). `opposite`: it lies below 0. `within noise`: neither, although everything that the check
requires is there. `undecided`: required seeds, runs or scale are missing, or there are fewer than
{LEAST_DF} df. *Reads* is what the interval alone says, regardless of what is missing.

**Changes since.** On 2026-11-27, after the runs that `15.runs` judges, both checks of claim 15 were
extended: the cost must also be visible, so that permuted labels can test them. This can only take
outcomes away. On the same day, when one of ten runs of row 6a existed: a check now uses the first
of its folders that has everything it requires; before, the first run of a new row replaced a
complete set of runs. Later that day the wording of this page was edited, not the checks.

**Null models.** Each check is also computed on spectra in which there is nothing to find, while
losses stay as they are. *untrained*: every step has the spectra of step 0. *clock*: every metric is
1 + log(step + 1), or falls as this rises. *identity*: post equals pre, and JS is 0. *permuted
labels*: the designs are assigned to other runs (with up to {ALL_UP_TO} runs all orders, otherwise
{N_PERMUTATIONS}, without those that only rename designs); or the steps of each run, its layers, the
spectra of designs relative to their losses, or measured and unmeasured times are permuted. It is
passed if the check holds in more than {CHANCE:.0%} of the permutations. A null model that changes
nothing that a check uses does not test it: checks of losses and times are tested only by
permutation. If a check holds on a null model, this is stored as `passes_null`, and the check cannot
make its claim hold.

**Outcome of a claim.** `holds`: all core checks hold and none passes a null model. `does not hold`:
one is opposite, or within noise with everything that it requires. Otherwise `cannot be told here`.
"""


def page(judged: Sequence[Judged]) -> str:
    """The text of study/criteria.md."""
    parts = [
        RULE,
        "## The core checks\n",
        markdown(
            ["check", "what must hold", "effect", "above", "requires", "permutes", "paper"],
            [_check_row(check) for check in (*CHECKS, *OURS)],
        ),
        "\nReasons for the choice of effects:\n",
        *(f"- `{check.id}`: {check.why}" for check in (*CHECKS, *OURS) if check.why),
        f"\nWith {len(CHECKS)} checks at {LEVEL:.0%} and no effects, about "
        f"{len(CHECKS) * 0.025:.1f} would hold by chance and as many would be opposite.\n",
        "## The claims on the available runs\n",
        *(f"{claim.number}. {_claim(judged, claim.number)}" for claim in CLAIMS),
        "\nOur own claims; their readings were written before the runs, the checks after them:\n",
        *(f"- {number}. {title}: {_claim(judged, number)}" for number, title in TITLES.items()),
        "\n## The checks on the available runs\n",
        markdown(
            ["check", "runs", "scale", "effect", "df", "reads", "outcome", "passes_null"],
            [_found(each) for each in judged],
        ),
    ]
    return "\n".join(parts) + "\n"


def _check_row(check: CoreCheck) -> Sequence[str]:
    least = number(check.smallest, 2) if check.smallest else "0"
    requires = f"{check.seeds} {check.unit}; {check.scale}"
    return [f"`{check.id}`", check.states, check.effect, least, requires, check.labels, check.paper]


def _claim(judged: Sequence[Judged], claim: int) -> str:
    own = of_claim(judged, claim)
    sentences = []
    for each in own:
        passed = f", passes_null: {', '.join(each.passes_null)}" if each.passes_null else ""
        lacks = f", lacking {', '.join(each.missing)}" if each.missing else ""
        sentences.append(f"`{each.check.id}` {each.outcome}{lacks}{passed}")
    mark = " (exploratory)" if any(each.exploratory for each in own) else ""
    return f"**{outcome(own)}**{mark}: {'; '.join(sentences)}"


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
