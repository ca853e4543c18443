"""What a run records of its devices; which process records it, by what the run asks for."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from nerve.cli.experiment import machine
from nerve.cli.experiment.machine import is_alone, leads


def trainer(root: str, device_ids: list[int], num_nodes: int = 1) -> SimpleNamespace:
    strategy = SimpleNamespace(root_device=torch.device(root))
    return SimpleNamespace(strategy=strategy, device_ids=device_ids, num_nodes=num_nodes)


@pytest.mark.parametrize(
    ("ran_on", "name"),
    [
        (trainer("cpu", [0]), "cpu"),
        (trainer("cuda:0", [0]), "cuda:0 (GPU 0)"),
        (trainer("cuda:1", [1, 3]), "cuda:1 (GPU 1), cuda:3 (GPU 3)"),
        (trainer("cuda:0", [0, 1], 4), "cuda:0 (GPU 0), cuda:1 (GPU 1) on each of 4 nodes"),
    ],
)
def test_every_gpu_is_named(ran_on, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert machine.device_names(ran_on) == name


def test_the_versions_of_cuda_and_driver_are_those_of_runs_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(machine, "nvidia_driver", lambda: "570.86.15")
    versions = {"cuda": "12.8", "nvidia-driver": "570.86.15"}
    assert machine.gpu_versions(trainer("cuda:0", [0])) == versions
    assert machine.gpu_versions(trainer("cpu", [0])) == {}
    monkeypatch.setattr(machine, "nvidia_driver", lambda: None)
    assert machine.gpu_versions(trainer("cuda:0", [0])) == {"cuda": "12.8"}


ONE = {"accelerator": "cpu", "devices": 1}


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({}, True),
        ({"devices": "1"}, True),
        ({"devices": [0]}, True),
        ({"devices": "auto"}, True),
        ({"devices": 2}, False),
        ({"devices": [0, 1]}, False),
        ({"num_nodes": 2}, False),
        ({"accelerator": "gpu", "devices": "auto"}, False),
        ({"accelerator": "gpu", "devices": 1}, True),
    ],
)
def test_a_run_is_one_process_where_it_asks_for_one_device(changes, alone, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert is_alone(ONE | changes) == alone


def test_a_run_of_one_process_leads_whatever_task_of_a_job_it_is(monkeypatch):
    """Lightning takes the rank from SLURM_PROCID when it is imported."""
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    assert not leads(ONE | {"devices": 4})
    assert leads(ONE)
    assert rank_zero_only.rank == 0
