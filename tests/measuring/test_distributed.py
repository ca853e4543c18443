"""Several processes measure what a single one would: counts, means and scatter merge exactly."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Barrier, local
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from processes import lean_path, ranks, together
from support import TINY_RUN
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

import nerve
from nerve import RunRecord, RunStore
from nerve.errors import MeasurementError
from nerve.measuring.around import sites_around
from nerve.measuring.eigenproblem import FFNEigenproblem, FFNSpectra
from nerve.measuring.exchange import OfCovariance, exchange
from nerve.measuring.ffns import FFNAdapter, Site
from nerve.measuring.groups import Grouped
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.recording.solver import Solver
from nerve.spectra import StreamingCovariance
from nerve.training.monitor import FitMonitor

WORLD = 2
NUMBERS = [
    *("n_samples", "se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js"),
    *("variance_outside", "mean_share_pre", "mean_share_post", "largest_share_pre"),
    *("largest_share_post", "top_share_pre", "top_share_post"),
    *("position_ratio_pre", "position_ratio_post"),
]


def make_model(width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6)]
    return nn.Sequential(*layers, nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6)).double()


def ffns(model: nn.Sequential) -> list[FFNAdapter]:
    return [FFNAdapter(0, "ffn", model[0], model[2]), FFNAdapter(1, "ffn", model[3], model[5])]


def data() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 4, 6, generator=generator, dtype=torch.float64)
    x[:, 2] *= 1.5  # of the four positions
    return x * torch.linspace(1, 3, 300, dtype=torch.float64)[:, None, None] + 100


def join(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD
    )


def leave() -> None:
    dist.barrier()  # gloo aborts a process that leaves while another still talks to it
    dist.destroy_process_group()
    # One that is still there when the interpreter ends may abort the process.
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name]


SHARDS = [[0, 150, 300], [0, 299, 300], [0, 300, 300], [0, 0, 300]]
"""Where the data of each process begin and end: even, uneven and empty."""


@pytest.fixture
def group_of_three(monkeypatch: pytest.MonkeyPatch) -> local:
    """Three threads instead of processes. All receive the sum of what each contributes; in a sum
    for a single process, the others receive garbage."""
    barrier, given, me = Barrier(3, timeout=100), list[torch.Tensor](), local()

    def all_reduce(tensor: torch.Tensor) -> None:
        given.append(tensor.clone())
        barrier.wait()
        tensor.copy_(torch.stack(given).sum(0))
        if barrier.wait() == 0:
            given.clear()
        barrier.wait()

    def reduce(tensor: torch.Tensor, to: int) -> None:
        all_reduce(tensor)
        if me.rank != to:
            tensor.fill_(torch.nan)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "reduce", reduce)
    monkeypatch.setattr("nerve.measuring.exchange.rank", lambda: me.rank)
    return me


def samples(n: int, seed: int) -> torch.Tensor:
    """float64 `[n, 24]`; each part has a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 24, generator=generator, dtype=torch.float64) + 10 * seed


def assert_scatter(accumulator: StreamingCovariance, parts: list[torch.Tensor]) -> None:
    """The scatter agrees with NumPy to 1e-12 of the standard deviations."""
    expected = np.cov(torch.cat(parts).numpy().T, ddof=0) * sum(map(len, parts))
    deviation = np.sqrt(expected.diagonal())
    error = np.tril(accumulator.scatter().numpy() - expected) / np.outer(deviation, deviation)
    assert np.abs(error).max() <= 1e-12


@pytest.mark.parametrize("most_bytes", [1, 2**30])
@pytest.mark.parametrize("to", [0, 2])
@pytest.mark.parametrize("sizes", [(3, 5, 8), (0, 12, 700), (100, 300, 50)])
def test_one_process_receives_the_samples_of_all(
    group_of_three, monkeypatch, sizes, to, most_bytes
):
    """In one exchange, and part by part."""
    monkeypatch.setattr("nerve.measuring.exchange.MOST_BYTES", most_bytes)
    parts = [samples(n, seed) for seed, n in enumerate(sizes)]
    accumulators = [StreamingCovariance(24) for _ in parts]
    for accumulator, part in zip(accumulators, parts, strict=True):
        accumulator.update(part)

    tallies = [accumulator.tally() for accumulator in accumulators]

    def reduce(rank: int) -> None:
        group_of_three.rank = rank
        exchange([OfCovariance(accumulators[rank], to, tallies)], [])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(reduce, range(3)))
    for accumulator in accumulators:
        assert accumulator.n_samples == sum(sizes)
        assert accumulator.precision == "float64"
    receiver = accumulators[to]
    assert_scatter(receiver, parts)
    receiver.update(samples(50, seed=9))
    assert_scatter(receiver, [*parts, samples(50, seed=9)])


def transposed(model: nn.Sequential) -> nn.Sequential:
    """The model with weights that lie in memory as those of the Conv1D of transformers do."""
    for module in model:
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)
    return model


def measure_shards(rank: int, folder: str) -> None:
    join(rank, folder)
    for number, bounds in enumerate(SHARDS):
        for shortcut in (True, False):
            model = transposed(make_model())
            probe = Probe(ffns(model))
            probe.install()
            measurement = Measurement(probe, shortcut=shortcut)
            measurement.start()
            for batch in data()[bounds[rank] : bounds[rank + 1]].split(70):
                if len(batch):
                    model(batch)
                    measurement.finish_forward()
            measurement.stop()
            measurement.reduce()
            (problem,) = measurement.eigenproblems(rank, WORLD)
            row = json.dumps(problem.solve().row())
            Path(folder, f"{number}-{shortcut}-{rank}.json").write_text(row)
    for offset in OFFSETS:
        model = make_model().bfloat16()
        probe = Probe(ffns(model))
        probe.install()
        measurement = Measurement(probe, shortcut="projected")
        measurement.start()
        model(rounded_part(rank, offset))
        measurement.finish_forward()
        measurement.stop()
        measurement.reduce()
        (problem,) = measurement.eigenproblems(rank, WORLD)
        row = json.dumps({"of_input": problem.of_input, **problem.solve().row()})
        Path(folder, f"rounded-{offset}-{rank}.json").write_text(row)
    model = make_model(width=16)
    probe = Probe(pooled(model))
    probe.install()
    measurement = Measurement(probe)
    measurement.start()
    model(data()[150 * rank : 150 * (rank + 1)])
    measurement.finish_forward()
    measurement.stop()
    measurement.reduce()
    rows = [problem.solve().row() for problem in measurement.eigenproblems(rank, WORLD)]
    Path(folder, f"pooled-{rank}.json").write_text(json.dumps(rows))
    leave()


OFFSETS = (0, 100)


def rounded_part(rank: int, offset: int) -> torch.Tensor:
    """The features of one process; the mean of the second one is `offset`."""
    return (data()[150 * rank : 150 * (rank + 1)] - 100 + offset * rank).bfloat16()


@pytest.mark.parametrize("offset", OFFSETS)
def test_pre_is_projected_by_all_processes_or_by_none(measured_shards, offset):
    """If rounding matters in one process, the inputs of the others are converted."""
    model = make_model().bfloat16()
    parts = [rounded_part(rank, offset) for rank in range(WORLD)]
    one = nerve.measure(model, parts, ffns=ffns(model), shortcut="projected")
    paths = [measured_shards / f"rounded-{offset}-{rank}.json" for rank in range(WORLD)]
    rows = pd.DataFrame([json.loads(path.read_text()) for path in paths])
    np.testing.assert_allclose(rows[NUMBERS], one[NUMBERS], rtol=1e-6)
    assert rows["of_input"].tolist() == [offset == 0] * WORLD
    assert set(rows["precision"]) == set(one["precision"]) == {"projected_bfloat16"}


def sequences(bounds: list[int]) -> torch.Tensor:
    """The data as sequences of five, so that each quarter of the later positions is one
    position."""
    return data().reshape(240, 5, 6)[bounds[0] * 4 // 5 : bounds[1] * 4 // 5]


def around(model: nn.Sequential) -> list[FFNAdapter]:
    """The FFNs, with their own input and output as the stream."""
    streams = [(Site(model[i], "input"), Site(model[i + 2], "output")) for i in (0, 3)]
    return [replace(ffn, stream=stream) for ffn, stream in zip(ffns(model), streams, strict=True)]


def measure_groups_of_shards(rank: int, folder: str) -> None:
    join(rank, folder)
    for number, bounds in enumerate(SHARDS):
        model = make_model()
        described, sites = around(model), ("stream_in", "input", "output")
        probe = Probe(described, sites_around(described, sites))
        probe.install()
        measurement = Measurement(probe, grouped=Grouped(("position",)), sites=sites)
        measurement.start()
        for batch in sequences(bounds[rank : rank + 2]).split(70):
            if len(batch):
                model(batch)
                measurement.finish_forward()
        measurement.stop()
        measurement.reduce()
        (problem,) = measurement.eigenproblems(rank, WORLD)
        groups = [each.solve().row() for each in measurement.group_eigenproblems(rank, WORLD)]
        row = json.dumps([problem.solve().row(), groups])
        Path(folder, f"groups-{number}-{rank}.json").write_text(row)
    leave()


def test_groups_and_sites_of_two_processes_are_those_of_one_over_the_union(tmp_path):
    """Position by position, and merged; with even, uneven and empty shards."""
    together(measure_groups_of_shards, WORLD, tmp_path)
    model = make_model()
    one = nerve.measure(
        model, [sequences([0, 300])], ffns=around(model), into=tmp_path / "one",
        groups=["position"], sites=["stream_in", "input", "output"],
    )  # fmt: skip
    keys = ["layer", "site", "grouping", "group"]
    groups = nerve.load_groups(tmp_path / "one").set_index(keys)
    for number in range(len(SHARDS)):
        paths = [tmp_path / f"groups-{number}-{rank}.json" for rank in range(WORLD)]
        found = [json.loads(path.read_text()) for path in paths]
        rows = pd.DataFrame([row for row, _ in found])
        np.testing.assert_allclose(rows[NUMBERS], one[NUMBERS], rtol=1e-10)
        split = pd.DataFrame([row for _, rows in found for row in rows]).set_index(keys)
        split = split.drop(index="like_0", level="group")  # which of the others, each decides
        assert len(split) == 2 * (2 * 5 + 3)
        numbers = ["n_samples", "se", "pr", "eee", "variance"]
        np.testing.assert_allclose(split[numbers], groups.loc[split.index, numbers], rtol=1e-10)


def pooled(model: nn.Sequential) -> list[FFNAdapter]:
    """The FFNs of a model as if they were experts of one layer."""
    return [
        replace(ffn, layer=0, name=f"expert_{number}", pool="experts")
        for number, ffn in enumerate(ffns(model))
    ]


@pytest.fixture(scope="module")
def measured_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    together(measure_shards, WORLD, folder)
    return folder


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("number", range(len(SHARDS)))
def test_two_processes_equal_one_over_the_union(measured_shards, number, shortcut):
    """Even, uneven and empty shards, in float64, to 1e-10; each process solves one of the FFNs, and
    one without samples receives the weight."""
    model = make_model()
    one = nerve.measure(model, [data()], ffns=ffns(model), shortcut=shortcut)
    names = [f"{number}-{shortcut}-{rank}.json" for rank in range(WORLD)]
    rows = [json.loads((measured_shards / name).read_text()) for name in names]
    np.testing.assert_allclose(pd.DataFrame(rows)[NUMBERS], one[NUMBERS], rtol=1e-10)
    assert [row["layer"] for row in rows] == [0, 1]


def test_a_pool_contains_the_samples_of_all_processes(measured_shards):
    """Converted from inputs that were accumulated instead of pre, merged, then reduced."""
    model = make_model(width=16)
    one = nerve.measure(model, [data()], ffns=pooled(model))
    dealt = [json.loads((measured_shards / f"pooled-{r}.json").read_text()) for r in range(WORLD)]
    rows = pd.DataFrame([dealt[0][0], dealt[1][0], dealt[0][1]])
    assert rows["ffn"].tolist() == one["ffn"].tolist() == ["expert_0", "expert_1", "experts"]
    assert rows["n_samples"].tolist() == [1200, 1200, 2400]
    numbers = [name for name in NUMBERS if one[name].notna().all()]
    np.testing.assert_allclose(rows[numbers].astype(float), one[numbers], rtol=1e-10)


def measure_sharded_weights(rank: int, folder: str) -> None:
    join(rank, folder)
    for shard in (fully_shard, partial(FullyShardedDataParallel, device_id=torch.device("cpu"))):
        model = make_model()
        described = ffns(model)
        sharded = shard(model)
        probe = Probe(described)
        probe.install()
        measurement = Measurement(probe)
        measurement.start()
        for batch in data()[150 * rank : 150 * (rank + 1)].split(70):
            sharded(batch)
            measurement.finish_forward()
        measurement.stop()
        measurement.reduce()
        (problem,) = measurement.eigenproblems(rank, WORLD)
        path = Path(folder, f"{shard is fully_shard}-{rank}.json")
        path.write_text(json.dumps(problem.solve().row()))
        probe.remove()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # FSDP keeps gloo's threads, with which an interpreter may abort at its end


def test_sharded_weights_are_measured_like_unsharded_ones(tmp_path):
    """Both generations of FSDP, with the data split as well."""
    model = make_model()
    one = nerve.measure(model, [data()], ffns=ffns(model))
    together(measure_sharded_weights, WORLD, tmp_path)
    for newer in (True, False):
        paths = [tmp_path / f"{newer}-{rank}.json" for rank in range(WORLD)]
        rows = pd.DataFrame([json.loads(path.read_text()) for path in paths])
        np.testing.assert_allclose(rows[NUMBERS], one[NUMBERS], rtol=1e-10)


def test_features_split_by_tensor_parallelism_raise(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for whole, output in ((False, None), (True, Replicate())):
            model = make_model()
            split = ColwiseParallel(output_layouts=output, use_local_output=not whole)
            parallelize_module(model[0], mesh, split)
            with pytest.raises(MeasurementError, match="ffn in layer 0 are split over processes"):
                nerve.measure(model, [data()], ffns=ffns(model)[:1])
    finally:
        dist.destroy_process_group()


class Late(FFNEigenproblem):
    """An eigenproblem that is not solved before a file exists."""

    file: Path

    def solve(self) -> FFNSpectra:
        until = time.monotonic() + 100
        while not self.file.exists() and time.monotonic() < until:
            time.sleep(0.01)
        return super().solve()


def late(problem: FFNEigenproblem, file: Path) -> FFNEigenproblem:
    held = Late(**vars(problem))
    object.__setattr__(held, "file", file)
    return held


def solve_shares(rank: int, folder: str) -> None:
    join(rank, folder)
    solve_beside(rank, folder)
    for broken in (None, 1):
        solver = Solver(torch.device("cpu"))
        solved, errors = [], []
        for step in range(2):
            problems = [
                make_eigenproblem(layer, broken == layer) for layer in range(rank, 3, WORLD)
            ]
            try:
                solved += solver.submit({"step": step}, problems)
            except MeasurementError as error:
                errors.append(str(error))
        told = {"layers": [[s.layer for s in item.spectra] for item in solved], "errors": errors}
        Path(folder, f"{broken}-{rank}.json").write_text(json.dumps(told))
    leave()


def solve_beside(rank: int, folder: str) -> None:
    """Process 1 solves its share of step 0 after process 0 has continued, and cannot solve its
    share of step 1."""
    solver, go = Solver(torch.device("cpu"), n_workers=1), Path(folder, "go")
    problem = make_eigenproblem(rank, broken=False)
    before = [*solver.submit({"step": 0}, [late(problem, go) if rank == 1 else problem])]
    before += solver.finished()
    is_early = not go.exists()
    if rank == 0:
        go.touch()
    solved = list(solver.drain())
    broken = make_eigenproblem(rank, broken=rank == 1)
    solved += [*solver.submit({"step": 1}, [broken]), *solver.finished()]
    wait([each.future for pending in solver._pending for each in pending.waiting])
    try:
        solver.submit({"step": 2}, [make_eigenproblem(rank, broken=False)])
        error = ""
    except MeasurementError as raised:
        error = str(raised)
    layers = [[spectra.layer for spectra in item.spectra] for item in solved]
    told = {"early": is_early, "before": len(before), "layers": layers, "error": error}
    Path(folder, f"beside-{rank}.json").write_text(json.dumps(told))
    solver.close()


def test_no_process_waits_for_what_another_one_solves(shares_solved):
    """Late spectra are returned by the next `drain`; an error is raised in both processes."""
    first, second = (json.loads((shares_solved / f"beside-{r}.json").read_text()) for r in (0, 1))
    assert first["early"]
    assert first["before"] == 0
    assert first["layers"][0] == [0, 1]
    assert [1] in second["layers"]
    for process in (first, second):
        assert "ffn in layer 1 at step 1 could not be solved" in process["error"]


def make_eigenproblem(layer: int, broken: bool) -> FFNEigenproblem:
    scatter = torch.diag(torch.tensor([1.0, -1.0 if broken else 1.0], dtype=torch.float64))
    shares = torch.zeros(2, 4, dtype=torch.float64)
    return FFNEigenproblem(
        layer, "ffn", 10, 2, 2, "float64", before=scatter, post=scatter, shares=shares
    )


@pytest.fixture(scope="module")
def shares_solved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solved")
    together(solve_shares, WORLD, folder)
    return folder


def test_processes_share_eigenproblems_and_errors(shares_solved):
    """Process 0 receives all spectra in order; process 1 solves layer 1, and its error reaches
    both."""

    def told(broken: int | None) -> list[dict]:
        names = [f"{broken}-{rank}.json" for rank in range(WORLD)]
        return [json.loads((shares_solved / name).read_text()) for name in names]

    assert told(None) == [
        {"layers": [[0, 1, 2]] * 2, "errors": []},
        {"layers": [[1]] * 2, "errors": []},
    ]
    for process in told(1):
        for step in range(2):
            assert f"layer 1 at step {step} could not be solved" in process["errors"][step]


def one_command(arguments: list[str], cwd: Path) -> tuple[list[int], str]:
    """One command from scratch; Lightning starts the second process."""
    command = [sys.executable, "-m", "nerve.cli.run", *arguments]
    environment = os.environ | {"PYTHONPATH": lean_path()}
    ended = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200
    )
    return [ended.returncode], ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("source", "launch"), [("heldout", one_command), ("train", partial(ranks, WORLD))]
)
def test_a_run_of_two_processes_stores_the_rows_of_one(tmp_path, source, launch):
    """Gradients in float32 are summed in another order, so rows agree to 1e-5, and step 0 to
    1e-6."""
    common = [
        *TINY_RUN,
        "model.d_model=32",
        "model.seq_len=32",
        "trainer.max_steps=4",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        f"monitor.source={source}",
        "logger=none",
    ]
    for name, extra, started in (
        ("one", [], partial(ranks, 1)),
        ("two", ["trainer=ddp", "trainer.devices=2"], launch),
    ):
        statuses, output = started([*common, *extra, f"hydra.run.dir={name}"], tmp_path)
        assert set(statuses) == {0}, output
    one, two = (nerve.load_metrics(tmp_path / name) for name in ("one", "two"))
    assert one.step.tolist() == two.step.tolist()
    columns = [*NUMBERS, "tokens_seen", "train_loss", "val_loss", "lr"]
    np.testing.assert_allclose(two[columns], one[columns], rtol=1e-5, atol=1e-7)
    first = one.step == 0
    # JS is near 0 there, a difference of numbers near 1.
    np.testing.assert_allclose(two[first][NUMBERS], one[first][NUMBERS], rtol=1e-6, atol=1e-8)
    assert nerve.load_runs(tmp_path / "two").run_status.tolist() == ["done"]


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = ((self.model(batch[0]) - 1) ** 2).mean()
        return {"loss": loss, "n_targets": len(batch[0])}

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def train_own_model(rank: int, folder: str) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy="ddp",
        precision="64-true",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Model()
    store = None
    if trainer.global_rank == 0:
        directory = Path(folder, "run")
        store = RunStore(directory, RunRecord.create(directory, {}).run_id)
    trainer.callbacks.append(FitMonitor(store, every_n_steps=1, ffns=ffns(module.model)))
    loader = DataLoader(TensorDataset(data()), batch_size=30)
    trainer.fit(module, loader, loader)


def test_held_out_data_that_lightning_splits_over_processes_are_measured_together(tmp_path):
    """An ordinary DataLoader: each process evaluates half of it."""
    together(train_own_model, WORLD, tmp_path)
    rows = nerve.load_metrics(tmp_path / "run")
    assert rows["step"].tolist() == [0, 0, 1, 1]
    model = make_model()
    expected = nerve.measure(model, [data()], ffns=ffns(model))
    loss = ((model(data()) - 1) ** 2).mean().item()
    for step in (0, 1):  # the rate is 0
        own = rows[rows["step"] == step]
        np.testing.assert_allclose(own[NUMBERS], expected[NUMBERS], rtol=1e-9)
        np.testing.assert_allclose(own["val_loss"], loss, rtol=1e-12)
