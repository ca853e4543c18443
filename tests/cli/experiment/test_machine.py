"""What a run records of the devices that it computes on."""

from types import SimpleNamespace

import pytest
import torch

from nerve.cli.experiment import machine


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
