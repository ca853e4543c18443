"""The measured samples of features `[batch, seq, width]`, against those picked by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFNAdapter
from nerve.measuring.groups import NOT_GROUPED, Grouped
from nerve.measuring.masks import ALL, Chosen, Order
from nerve.measuring.samples import Samples

N, T, D = 3, 5, 4
FEATURES = torch.arange(float(N * T * D)).reshape(N, T, D)
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()

# How the tokens lie, and what says so.
LAYOUTS = {
    "as they are": (FEATURES, None, MASK),
    "flattened": (FEATURES.flatten(0, 1), None, MASK),
    "flattened, known": (FEATURES.flatten(0, 1), Order(N, T, batch_first=True), MASK),
    "position first": (FEATURES.transpose(0, 1), Order(N, T, batch_first=False), MASK),
}


def samples_of(skip_first=0, grouped=NOT_GROUPED):
    ffn = FFNAdapter(0, "ffn", nn.Linear(D, D), nn.Linear(D, D))
    return Samples(SimpleNamespace(ffns=[ffn]), skip_first, grouped)


@pytest.mark.parametrize(("features", "order", "mask"), LAYOUTS.values(), ids=LAYOUTS)
def test_samples_that_count_are_the_same_in_any_layout(features, order, mask):
    samples = samples_of()
    samples.start(Chosen(mask, None if order is None else [order]))
    taken = samples.taken(0, features, {"pre": features, "post": 2 * features})
    torch.testing.assert_close(taken.features["pre"][taken.mask], FEATURES[MASK])
    torch.testing.assert_close(taken.features["post"][taken.mask], 2 * FEATURES[MASK])
    around, around_mask = samples.taken_around(0, features)
    torch.testing.assert_close(around[around_mask], FEATURES[MASK])


@pytest.mark.parametrize("skip_first", [0, 1])
@pytest.mark.parametrize("mask", [None, MASK])
def test_a_part_of_a_batch_is_used_as_it_is_if_all_samples_count(mask, skip_first):
    """As from a model that splits the batch; which part it is is unknown."""
    samples, part = samples_of(skip_first), FEATURES[:2]
    samples.start(Chosen(mask, [Order(N, T, batch_first=True)]))
    if mask is None and not skip_first:
        taken = samples.taken(0, part, {"pre": part, "post": part})
        assert torch.equal(taken.features["post"], part)
        assert torch.equal(samples.taken_around(0, part)[0], part)
    else:
        with pytest.raises(MeasurementError, match="now its features have the shape"):
            samples.taken(0, part, {"pre": part, "post": part})


@pytest.mark.parametrize("skip_first", [1, 3])
@pytest.mark.parametrize("name", ["as they are", "position first"])
def test_skipped_positions_are_removed_from_features_and_mask(name, skip_first):
    features, order, mask = LAYOUTS[name]
    samples = samples_of(skip_first)
    samples.start(Chosen(mask, None if order is None else [order]))
    taken = samples.taken(0, features, {"pre": features, "post": features})
    expected = FEATURES[:, skip_first:][MASK[:, skip_first:]]
    torch.testing.assert_close(taken.features["pre"][taken.mask], expected)
    around, around_mask = samples.taken_around(0, features)
    torch.testing.assert_close(around[around_mask], expected)
    samples.require_positions()


def test_skipping_all_positions_raises_only_at_the_end():
    """Another batch may have longer sequences."""
    samples = samples_of(T)
    samples.start(ALL)
    assert (
        samples.taken(0, FEATURES, {"pre": FEATURES, "post": FEATURES}).features["pre"].numel() == 0
    )
    with pytest.raises(MeasurementError, match=f"skip_first={T} for sequences of at most {T}"):
        samples.require_positions()
    for features in (torch.zeros(1, T + 1, D), FEATURES):
        samples.taken(0, features, {"pre": features, "post": features})
    samples.require_positions()


def test_halves_continue_across_forward_passes():
    """Every other sequence over all passes; two runs within one pass are of the same sequences."""
    samples = samples_of(grouped=Grouped(("halves",)))

    def half_a():
        samples.start(ALL)
        divisions = samples.taken(0, FEATURES, {"pre": FEATURES, "post": FEATURES}).divisions
        return sorted({int(row) // T for row in divisions["halves"].parts["a"]})

    assert half_a() == [0, 2]
    assert half_a() == [0, 2]
    samples.finish_forward()
    assert half_a() == [1]
