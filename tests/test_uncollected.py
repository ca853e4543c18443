"""Garbage collection is disabled during imports that take seconds."""

import gc
import sys

import pytest

from nerve import cores


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_while_torch_is_imported(monkeypatch, fails):
    """Also if the import fails, collection is enabled again afterwards, excluding the objects that
    exist by then."""
    frozen = []
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    try:
        with cores.uncollected():
            assert not gc.isenabled()
            if fails:
                raise ImportError
    except ImportError:
        assert fails
    assert gc.isenabled()
    assert frozen == [False]


def test_a_process_that_has_torch_already_is_left_as_it_is(monkeypatch):
    """The garbage that a notebook has made by then must not stay."""
    monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setattr(gc, "freeze", lambda: pytest.fail("frozen"))
    with cores.uncollected():
        assert gc.isenabled()
