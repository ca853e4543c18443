"""The devices that a run records, the process that records it, and the memory that it needs."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from support import composed

from nerve.cli.config.compose import CONF
from nerve.cli.experiment import machine
from nerve.cli.experiment.machine import Estimate, leads, least_memory, n_processes_of
from nerve.cli.experiment.plan import Plan
from nerve.errors import ConfigError


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


def test_only_runs_on_a_gpu_record_the_versions_of_cuda_and_the_driver(monkeypatch):
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
        ({"accelerator": "gpu", "devices": "2,"}, True),
        ({"accelerator": "gpu", "devices": "0,1"}, False),
    ],
)
def test_a_run_that_requests_one_device_is_one_process(changes, alone, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert (n_processes_of(ONE | changes) == 1) == alone


def test_a_run_of_one_process_leads_in_any_task_of_a_job(monkeypatch):
    """Lightning takes the rank from SLURM_PROCID when it is imported."""
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    assert not leads(ONE | {"devices": 4})
    assert leads(ONE)


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(machine.CUDAAccelerator, "is_available", lambda: False)
    monkeypatch.setattr(machine.MPSAccelerator, "is_available", lambda: True)


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "auto"])
def test_a_machine_whose_gpu_has_no_float64_is_refused(no_cuda, accelerator):
    """Lightning would take Apple's GPU for each of these."""
    plan = Plan.of(composed("logger=none", f"trainer.accelerator={accelerator}"))
    with pytest.raises(ConfigError, match="float64"):
        machine.check_machine(plan)


def test_devices_that_are_listed_in_a_string_are_counted(monkeypatch):
    """As Lightning reads them; the other devices of the machine are not used."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    listed = {"accelerator": "gpu", "devices": "0,3"}
    assert n_processes_of(listed) == n_processes_of(listed | {"devices": [0, 3]}) == 2


def test_a_run_must_fit_into_the_memory_of_its_container(monkeypatch):
    """Not only into that of the host."""
    plan = Plan.of(composed("logger=none", "model.n_layers=100"))
    monkeypatch.setattr("nerve.cores._memory_limits", lambda: [10**6])
    monkeypatch.setattr(machine.Path, "read_text", lambda path: "SwapTotal: 0 kB")
    with pytest.raises(ConfigError, match="and it has 0 GB"):
        machine.check_machine(plan)


TB = 10**12


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.vocab_size=1000000000"],
        ["data.batch_size=10000000"],
        ["ffn.width=1e9"],
        ["model.seq_len=1000000000000"],
        ["position=alibi", "model.n_heads=100000000", "model.d_model=100000000"],
    ],
    ids=" ".join,
)
def test_absurd_sizes_are_refused_by_their_least_memory(overrides):
    plan = Plan.of(composed("logger=none", *overrides))
    with pytest.raises(ConfigError, match=r"need at least [\d,]+ GB, and it has 500 GB"):
        machine.require_memory(plan, TB // 2)


def test_memory_counts_the_sequences_of_the_data_not_the_longest_that_the_model_accepts():
    short, long = (
        Plan.of(composed("logger=none", "position=rope", f"model.seq_len={n}", "data.seq_len=128"))
        for n in (128, 1_000_000)
    )
    assert least_memory(short, 1) == least_memory(long, 1)


@pytest.mark.parametrize(
    ("precision", "same", "n_bytes"),
    [
        ("null", "32-true", 4),
        ("32", "32-true", 4),
        ("'64'", "64-true", 8),
        ("bf16-true", "16-true", 2),
    ],
)
def test_a_precision_counts_the_same_under_each_of_its_names(precision, same, n_bytes):
    """Weights, gradients and the two moments of AdamW; of 32 and 64 bits, pre follows from the
    input."""
    given = ("logger=none", "data.vocab_size=300", "monitor.layers=[0]")
    named, full = (Plan.of(composed(*given, f"trainer.precision={p}")) for p in (precision, same))
    estimate = Estimate.of(named)
    assert estimate == Estimate.of(full)
    width = 128 if same in ("32-true", "64-true") else 512
    covariances = 8 * (512**2 + width**2)
    assert estimate.memory_bytes - covariances == 4 * n_bytes * estimate.n_parameters
    assert least_memory(named, 1) == least_memory(full, 1)


PRESETS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_preset_is_refused_if_it_fits(preset, precision):
    """The estimate, which leaves out activations, is above the lower bound."""
    images = ["data.images.path=x"] if preset in ("mixer_b16", "mixer_b4") else []
    plan = Plan.of(
        composed("logger=none", f"model={preset}", f"trainer.precision={precision}", *images)
    )
    machine.require_memory(plan, 80 * 10**9)
    estimated = Estimate.of(plan).memory_bytes
    logits = 0
    if plan.model.kind == "gpt":
        positions = plan.values["data"]["batch_size"] * plan.values["model"]["seq_len"]
        logits = 4 * positions * plan.values["data"]["vocab_size"]
    assert estimated is None or 0 < least_memory(plan, 1) <= estimated + logits


def test_sharded_weights_and_divided_batches_are_not_counted_whole():
    sharded = Plan.of(composed("logger=none", "trainer=fsdp", "data.vocab_size=1000000000"))
    machine.require_memory(sharded, TB * 1000)
    alone = Plan.of(composed("logger=none", "data.batch_size=64"))
    assert least_memory(alone, 4) < least_memory(alone, 1)
