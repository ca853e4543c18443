"""The devices that a trial requests, compared with what its launcher provides."""

import pytest

from nerve.cli.config.compose import SUBMITIT_SLURM
from nerve.cli.sweep.devices import check_devices
from nerve.errors import ConfigError

HERE = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
CPU = {"accelerator": "cpu", "strategy": "auto", "devices": 1}
GPU = {"accelerator": "gpu", "strategy": "auto", "devices": 1}
JOB = {"_target_": SUBMITIT_SLURM, "nodes": 1, "tasks_per_node": 1, "gpus_per_node": None}


@pytest.mark.parametrize("devices", [1, "1", [3], "auto", -1])
def test_a_trial_on_this_machine_has_one_process(devices):
    check_devices(CPU | {"devices": devices}, HERE)


@pytest.mark.parametrize(
    ("trainer", "named"),
    [
        (CPU | {"devices": 2}, "trainer.devices=2"),
        (GPU | {"devices": [0, 1], "strategy": "ddp"}, "trainer.strategy=ddp"),
        (CPU | {"num_nodes": 2}, "hydra/launcher=slurm"),
    ],
)
def test_trials_that_start_more_processes_are_refused_on_this_machine(trainer, named):
    with pytest.raises(ConfigError, match="each trial is one process") as refused:
        check_devices(trainer, HERE)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    "launcher",
    [
        {"tasks_per_node": 4, "gpus_per_node": 4},
        {"tasks_per_node": 4, "gpus_per_node": 8},
        {"tasks_per_node": 4, "gpus_per_task": 1},
        {"tasks_per_node": 4, "gres": "gpu:a100:4"},
        {"tasks_per_node": 4, "additional_parameters": {"gpus_per_node": "a100:4"}},
        {"tasks_per_node": 4, "additional_parameters": {"gres": "gpu:4"}},
    ],
)
def test_a_job_with_one_task_and_one_gpu_per_device_is_submitted(launcher):
    check_devices(GPU | {"devices": 4}, JOB | launcher)
    with pytest.raises(ConfigError, match=r"needs hydra\.launcher\.tasks_per_node=2, got 4"):
        check_devices(GPU | {"devices": 2}, JOB | launcher)


def test_a_job_on_cpus_needs_no_gpu():
    job = JOB | {"tasks_per_node": 2}
    check_devices(CPU | {"devices": 2}, job)
    with pytest.raises(ConfigError, match="gpus_per_node=2, got None"):
        check_devices(GPU | {"devices": 2}, job)


@pytest.mark.parametrize(
    ("trainer", "launcher", "named"),
    [
        ({"devices": "auto"}, {}, "trainer.devices=auto"),
        ({"num_nodes": 2}, {}, "hydra.launcher.nodes=2, got 1"),
        ({}, {"nodes": 2}, "hydra.launcher.nodes=1, got 2"),
        ({}, {}, "hydra.launcher.gpus_per_node=1, got None"),
        ({}, {"additional_parameters": {"mail-type": "END"}}, "gpus_per_node=1, got None"),
        ({}, {"additional_parameters": None}, "gpus_per_node=1, got None"),
        ({}, {"additional_parameters": {"gres": "", "gpus": 0}}, "gpus_per_node=1, got None"),
        ({"devices": 2}, {"tasks_per_node": 2, "gpus_per_node": 1}, "gpus_per_node=2, got 1"),
    ],
)
def test_a_job_that_requests_other_devices_than_it_uses_is_refused(trainer, launcher, named):
    with pytest.raises(ConfigError) as refused:
        check_devices(GPU | trainer, JOB | launcher)
    assert named in str(refused.value)


@pytest.mark.parametrize("value", [False, None, ["gpu:1"], {"gpu": 1}])
def test_options_that_sbatch_cannot_read_are_refused(value):
    """submitit writes any value as text, so that requeue=false would become --requeue=False."""
    job = JOB | {"additional_parameters": {"mail-type": "END", "requeue": value}}
    words = r"got hydra\.launcher\.additional_parameters\.requeue=.*, or leave it out with ~hydra"
    with pytest.raises(ConfigError, match=words):
        check_devices(CPU | {"devices": 1}, job)
    check_devices(
        CPU | {"devices": 1}, JOB | {"additional_parameters": {"requeue": True, "nice": 3}}
    )
