"""Kernels that are needed only for a large mean are compiled once, beside training; a failure is
logged."""

import threading

import pytest
import torch

from nerve.recording import preparation
from nerve.recording.preparation import Preparation

CPU = torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch):
    """The devices for which kernels were compiled, as if this machine had a GPU."""
    devices: list[torch.device] = []
    monkeypatch.setattr(preparation, "has_kernels", lambda device: True)
    monkeypatch.setattr(preparation, "prepare_centered", devices.append)
    return devices


def test_kernels_are_compiled_once_after_bfloat16_was_multiplied(compiled):
    """Whether or not pre is projected: the features after the nonlinearity are multiplied, too."""
    prepared = Preparation(CPU)
    prepared.start({"float64", "float16x2"})
    prepared.close()
    assert compiled == []
    for _ in range(2):
        prepared.start({"projected_bfloat16", "bfloat16"})
        prepared.close()
    assert compiled == [CPU]


def test_without_kernels_nothing_is_compiled(compiled, monkeypatch):
    monkeypatch.setattr(preparation, "has_kernels", lambda device: False)
    prepared = Preparation(CPU)
    prepared.start({"bfloat16"})
    prepared.close()
    assert compiled == []


def test_training_does_not_wait_but_close_does_unless_it_could_hang(compiled, monkeypatch):
    gate = threading.Event()

    def compile_slowly(device: torch.device) -> None:
        assert gate.wait(100)
        compiled.append(device)

    monkeypatch.setattr(preparation, "prepare_centered", compile_slowly)
    prepared = Preparation(CPU)
    prepared.start({"bfloat16"})
    prepared.close(wait=False)
    assert compiled == []
    gate.set()
    prepared.close()
    assert compiled == [CPU]


def test_a_failure_is_logged_and_changes_nothing_else(compiled, monkeypatch, caplog):
    def fail(device: torch.device) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(preparation, "prepare_centered", fail)
    prepared = Preparation(CPU)
    prepared.start({"bfloat16"})
    prepared.close()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("if they are needed: no C compiler")
