"""A measurement as named numbers: every layer, the means, and nothing for what was not measured."""

import math

import pytest

from nerve.metric_names import MEASURED, logged_values, mean_values
from nerve.storage.schema import METRICS


def row(layer: int, ffn: str = "ffn", **values: float | None) -> dict:
    return {"layer": layer, "ffn": ffn, **dict.fromkeys(MEASURED, 1.0), **values}


def test_the_names_are_columns_of_the_metrics_table():
    assert set(MEASURED) <= set(METRICS.names)


def test_each_layer_has_its_name_and_their_mean_another():
    values = logged_values(row(layer, pr_post=float(layer)) for layer in (0, 3, 12))
    assert (values["ffn/00/pr_post"], values["ffn/12/pr_post"]) == (0.0, 12.0)
    assert values["ffn/mean/pr_post"] == 5.0
    assert len(values) == 4 * len(MEASURED)


def test_a_mixer_has_means_of_each_kind_and_of_all():
    rows = [
        row(layer, ffn, se_pre=se)
        for ffn, ses in (("token_mixing", (1.0, 3.0)), ("channel_mixing", (5.0, 7.0)))
        for layer, se in enumerate(ses)
    ]
    means = mean_values(rows)
    assert means["se_pre"] == 4.0
    assert means["token_mixing/mean/se_pre"] == 2.0
    assert means["channel_mixing/mean/se_pre"] == 6.0
    assert logged_values(rows)["token_mixing/01/se_pre"] == 3.0


@pytest.mark.parametrize("missing", [None, math.nan])
def test_what_was_not_measured_does_not_count(missing):
    """As rows have it: None where they are made, NaN where they were read."""
    rows = [row(0, js=missing, pr_pre=missing), row(1, js=0.5, pr_pre=missing)]
    means, values = mean_values(rows), logged_values(rows)
    assert means["js"] == means["ffn/mean/js"] == values["ffn/mean/js"] == 0.5
    assert math.isnan(means["pr_pre"])
    assert math.isnan(means["ffn/mean/pr_pre"])
    assert values.keys().isdisjoint({"ffn/00/js", "ffn/00/pr_pre", "ffn/mean/pr_pre"})
