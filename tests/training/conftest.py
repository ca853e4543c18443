"""Fixtures for the tests of training."""

from functools import partial

import jaxtyping
import pytest
import torch


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
