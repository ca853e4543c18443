"""What the tests of training share."""

from functools import partial

import jaxtyping
import pytest
import torch


@pytest.fixture
def graphs(monkeypatch):
    """Compiles as far as AOTAutograd goes, and keeps the graphs that were made."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks cannot be compiled
    return made
