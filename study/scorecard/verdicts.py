"""The verdicts of the rule in the words of the page: the scorecard, the first line of each claim,
and the effect of each check at the sizes that were run."""

from collections.abc import Mapping, Sequence

from claims import CLAIMS
from criteria import CHECKS, OURS
from criteria.check import Judged
from evidence import Evidence, Sweep
from judgement import Claim
from wording import MISSING, number

from nerve.analysis.estimate import Estimate, Verdict, verdict

SYMBOLS: Mapping[Verdict, str] = {"holds": "✓", "does not hold": "✗", "cannot be told here": "?"}
NULLS: Mapping[str, str] = {
    "untrained": "an untrained network",
    "clock": "a clock",
    "identity": "an activation that does nothing",
    "permuted labels": "runs with permuted labels",
}
SIZES: Mapping[int, str] = {
    128: "4 × 128 (1M)",
    512: "12 × 512 (46M)",
    768: "12 × 768 (98M, 125M)",
    1024: "24 × 1024 (350M)",
}
"""The GPT of a d_model, with its parameters."""


def of_claim(judged: Sequence[Judged], number: int) -> list[Judged]:
    """The checks of a claim."""
    return [each for each in judged if each.check.claim == number]


def outcome(checks: Sequence[Judged]) -> Verdict:
    """The verdict on a claim, from its checks."""
    return verdict([(each.outcome, bool(each.passes_null)) for each in checks])


def interval(estimate: Estimate) -> str:
    """An effect and its 95% interval."""
    low, high = (number(bound, 2) for bound in (estimate.low, estimate.high))
    return f"{number(estimate.effect, 2)} [{low}, {high}]"


def scorecard(judged: Sequence[Judged], links: Mapping[Claim, str]) -> list[list[str]]:
    """One row per claim: its verdict, and one number of ours and of the paper."""
    rows = []
    for claim in CLAIMS:
        checks = of_claim(judged, claim.number)
        headline = checks[0]
        rows.append(
            [
                f"[{claim.number}]({links[claim]})",
                claim.short,
                SYMBOLS[outcome(checks)],
                MISSING if headline.estimate is None else interval(headline.estimate),
                MISSING
                if headline.check.paper_value is None
                else number(headline.check.paper_value, 2),
                _required(headline),
                _trained_on(headline),
            ]
        )
    return rows


def first_line(checks: Sequence[Judged]) -> str:
    """The verdict and why, in one paragraph."""
    found = outcome(checks)
    parts = [_because(each) for each in checks]
    nulls = sorted({NULLS[name] for each in checks for name in each.passes_null})
    also = (
        f" **It says less than it seems**: {_listed(nulls)} would also pass one of its checks."
        if nulls
        else ""
    )
    old = (
        " These runs are from before the rule." if any(each.exploratory for each in checks) else ""
    )
    return f"**{SYMBOLS[found]} {found.capitalize()}** because {'; '.join(parts)}.{also}{old}"


def over_scales(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each check of GPTs on its sources of runs, by the size of the network."""
    rows, by_size = [], {name: _by_size(evidence.sweep(name)) for name in evidence.names}
    for check in (*CHECKS, *OURS):
        found: dict[str, list[str]] = {size: [] for size in SIZES.values()}
        for source in filter(by_size.__contains__, check.sources):
            for size, sweep in by_size[source].items():
                judged = check.on(source, sweep)
                if judged is not None and judged.runs is not None and judged.estimate is not None:
                    tokens = judged.runs.tokens.max() / 1e6
                    amount = f"{tokens:,.0f}" if tokens >= 1 else number(tokens, 1)
                    found[size].append(f"{amount}M: {interval(judged.estimate)}")
        if any(found.values()):
            texts = ("; ".join(sorted(each)) or MISSING for each in found.values())
            rows.append([f"`{check.id}`", check.states, *texts, check.paper])
    return ["check", "what must hold", *SIZES.values(), "paper"], rows


def _by_size(sweep: Sweep) -> dict[str, Sweep]:
    """The runs of a sweep by the size of their network."""
    sizes = {size: sweep.runs["model.d_model"] == d_model for d_model, size in SIZES.items()}
    return {size: sweep.where(of_size) for size, of_size in sizes.items() if of_size.any()}


def _because(each: Judged) -> str:
    """An outcome and its reason."""
    check = each.check
    if each.estimate is None:
        return f"`{check.id}` has no runs ({check.states})"
    limit = f", required: above {number(check.smallest, 2)}" if check.smallest else ""
    words: dict[str, str] = {"undecided": f"is undecided, lacking {_listed(each.missing)}"}
    result = words.get(each.outcome, "is " * (each.outcome != "holds") + each.outcome)
    if each.outcome == "within noise" and each.estimate.low > 0:
        result = "is above 0, but not by as much as required"
    reads = ""
    if each.outcome == "undecided" and each.reading is not None:
        reads = f", where the interval alone reads {each.reading!r}"
    return f"`{check.id}` {result}: {check.states}, {interval(each.estimate)}{limit}{reads}"


def _required(each: Judged) -> str:
    """The effect, and its required size."""
    check = each.check
    effect = check.effect.partition("; or")[0]
    return f"{effect} (required: above {number(check.smallest, 2)})" if check.smallest else effect


def _trained_on(each: Judged) -> str:
    if each.estimate is None:
        return MISSING
    if each.runs is None:
        return f"{each.estimate.n_seeds} {each.check.unit}"
    tokens = each.runs.tokens.max()
    amount = f"{tokens / 1e6:,.0f}M tokens" if tokens >= 1e6 else f"{tokens / 1e3:,.0f}K images"
    n = each.estimate.n_seeds
    return f"{amount}, {n} {each.check.unit if n != 1 else each.check.unit.removesuffix('s')}"


def _listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
