"""How many cores there are to share."""

import os

from nerve import cores


def test_the_cores_are_those_that_the_system_allows(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 4, 6}, raising=False)
    assert cores.allowed() == 3


def test_where_the_system_does_not_say_they_are_all_or_one(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cores.allowed() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.allowed() == 1
