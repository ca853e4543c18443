"""Parameters that are updated at once."""

import torch
from torch import nn

from nerve.optim import alike as module
from nerve.optim.alike import alike


def parameters(*shapes, dtype=torch.float32):
    given = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for each in given:
        each.grad = torch.zeros_like(each)
    return given


def test_those_of_one_shape_and_dtype_come_together_in_their_order():
    given = parameters((2, 3), (3, 2), (2, 3), (3,)) + parameters((2, 3), dtype=torch.float64)
    places = {id(each): place for place, each in enumerate(given)}

    def lists():
        return [[places[id(each)] for each in some] for some in alike(given)]

    assert lists() == [[0, 2], [1], [3], [4]]
    given[0].grad = None
    assert lists() == [[1], [2], [3], [4]]


def test_no_more_is_stacked_than_is_faster(monkeypatch):
    """One parameter at least, however large it is."""
    monkeypatch.setattr(module, "MOST_ELEMENTS", 13)
    assert [len(some) for some in alike(parameters(*[(2, 3)] * 5))] == [2, 2, 1]
    assert [len(some) for some in alike(parameters(*[(4, 4)] * 2))] == [1, 1]


def test_what_else_they_have_in_common_counts():
    given = parameters(*[(2,)] * 4)
    parity = {id(each): index % 2 for index, each in enumerate(given)}
    assert [len(some) for some in alike(given, lambda each: parity[id(each)])] == [2, 2]
