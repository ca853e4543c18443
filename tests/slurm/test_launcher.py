"""The values of conf/hydra/launcher/slurm.yaml, without a cluster."""

import pytest
from omegaconf import DictConfig
from support import composed


def launcher(*overrides: str) -> DictConfig:
    return composed("hydra/launcher=slurm", *overrides, with_hydra=True).hydra.launcher


@pytest.mark.parametrize("devices", [1, 4])
def test_each_device_gets_a_process(devices):
    assert launcher(f"trainer.devices={devices}").tasks_per_node == devices


def test_srun_gets_the_cpus_that_the_job_requests():
    asked = launcher("hydra.launcher.cpus_per_task=12").additional_parameters
    assert asked.export == "ALL,SRUN_CPUS_PER_TASK=12"


def test_jobs_may_be_requeued_and_other_options_of_sbatch_are_added():
    asked = launcher("+hydra.launcher.additional_parameters.mail-type=END").additional_parameters
    assert asked.requeue is True
    assert asked["mail-type"] == "END"


def test_the_files_of_submitit_are_in_a_hidden_folder_of_the_sweep():
    folder = launcher("hydra.sweep.dir=outputs/mine").submitit_folder
    assert folder == "outputs/mine/.submitit/%j"
