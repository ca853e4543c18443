"""The longest runs, 125M parameters and 10,000 steps, on which claims 1, 3, 4, 6 and 7 rest."""

from evidence import Evidence, Sweep
from judgement import Table
from wording import coefficient, label, loss, number, perplexity, spread

from claims.nonlinearity import by_layer
from claims.normfree import deviation, named
from nerve import correlate_within_runs

SWEEP = "paper_normfree_gpu"
PAPER = {
    "PreLN GELU": ("2.714", "5.57 → 7.40", "125 → 860", "0.925 → 0.45", "0.28"),
    "norm-free GELU": ("3.223", *["–"] * 4),
    "norm-free ReLU": ("2.988", *["–"] * 4),
    "norm-free learnable leaky ReLU": ("3.081", *["–"] * 4),
}
"""Perplexity; SE, PR and EEE before and after the nonlinearity; the largest JS of a layer."""


def tables(evidence: Evidence) -> list[Table]:
    """Means over layers and the paper's values; values by layer; how metrics follow the loss."""
    if not evidence.has([SWEEP]):
        return []
    sweep = named(evidence.sweep(SWEEP))
    names = [name for name in PAPER if len(sweep.final("val_loss", name))]
    rows = []
    for name in names:
        losses = sweep.final("val_loss", name)
        shifts = [_shift(sweep, metric, name) for metric in ("se", "pr", "eee")]
        peak = spread(sweep.by_layer("js", name).max(axis=1))
        paper_perplexity, *paper = PAPER[name]
        rows.append([name, loss(losses), perplexity(losses), *shifts, peak])
        rows.append(["the paper's", "–", paper_perplexity, *paper])
    header = ["design", "loss", "perplexity", "SE", "PR", "EEE", "largest JS of a layer"]
    profiles = [
        by_layer(
            sweep, metric, names, f"{label(metric)} by layer at the last step, mean over seeds"
        )
        for metric in ("pr_gain", "js", "eee_post")
    ]
    deviations = [[name, *map(number, deviation(sweep, name))] for name in names]
    layers = [str(layer) for layer in sweep.by_layer("js", names[0]).columns]
    return [
        Table(
            "Means over layers and seeds at the last step (lowest to highest seed)", header, rows
        ),
        *profiles,
        Table(
            "SD of the nonlinearity's input u by layer, √(Σλ / d_ff), mean over seeds",
            ["layer", *layers],
            deviations,
        ),
        _following(sweep, names),
    ]


def _shift(sweep: Sweep, metric: str, level: str) -> str:
    pre, post = (spread(sweep.final(f"{metric}_{site}", level)) for site in ("pre", "post"))
    return f"{pre} → {post}"


def _following(sweep: Sweep, names: list[str]) -> Table:
    """r with the loss after warm-up, plain and given the clock, mean over seeds."""
    metrics = ("se_pre", "se_post", "pr_pre", "pr_post")
    within = correlate_within_runs(sweep.metrics, sweep.runs, ["level"], names=list(metrics))
    late = within[(within["flag"] == "ok") & (within["window"] == "after_warmup")]
    means = late.groupby(["level", "metric"])[["pearson", "given_clock"]].mean()
    rows = [
        [
            name,
            *(
                f"{coefficient(means.loc[(name, metric), 'pearson'])} "
                f"({coefficient(means.loc[(name, metric), 'given_clock'])})"
                for metric in metrics
            ),
        ]
        for name in names
    ]
    return Table(
        "r of a metric (mean over layers) and the loss over the steps after warm-up; in "
        "parentheses, the partial r given log(step + 1)",
        ["design", *map(label, metrics)],
        rows,
    )
