"""Fixtures for the tests of training."""

from functools import partial

import jaxtyping
import pytest
import torch

from nerve.training import launching


@pytest.fixture
def graphs(monkeypatch):
    """Compiles only up to AOTAutograd, and keeps the graphs."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks cannot be compiled
    return made


@pytest.fixture
def alone(monkeypatch):
    """As without anything that has started the processes of a run; they are ended soon."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # restored afterwards
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(launching, "ENDS_WITHIN_S", 0.3)
