"""Which process records a run: by what the run asks for, not by the job around it."""

import pytest
from lightning.pytorch.utilities import rank_zero_only

from nerve.cli.experiment.machine import is_alone, leads

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
