"""A run that is stopped and resumed equals an undisturbed one, bit for bit."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launched import launched
from processes import ended, ranks

import nerve
from nerve.cli.experiment import build
from nerve.errors import ConfigError
from nerve.measuring.messages import BELIEVED_AFTER_S
from nerve.models import build_model
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.training.checkpoint_files import read_checkpoint
from nerve.training.signals import Interrupted

N_STEPS = 3

CASES = [
    ["optimizer=adamw", "checkpoint.keep=[0,2,3]"],
    ["trainer.accumulate_grad_batches=3", "trainer.log_every_n_steps=2", "checkpoint.keep=[1,3]"],
    ["model.dropout=0.2", "monitor.source=train", "ffn.constraint=spectral_norm"],
    ["optimizer=muon", "trainer.accumulate_grad_batches=2", "ffn.constraint=weight_norm"],
    ["optimizer=dion", "trainer.accumulate_grad_batches=2", "monitor.source=train"],
    ["optimizer=soap", "model.dropout=0.2", "optimizer.precondition_frequency=2"],
    ["optimizer=shampoo", "optimizer.precondition_frequency=2", "position=rope", "ffn=gated"],
    ["optimizer=sgd", "activation=learnable_leaky_relu", "normalization=normfree"],
    ["optimizer=adafactor", "normalization=rmsnorm", "model.tie_embeddings=true"],
]


@pytest.mark.parametrize("overrides", CASES, ids=lambda case: " ".join(case)[:60])
def test_a_run_stopped_at_every_step_equals_an_undisturbed_one(
    experiment, stop_at, assert_same, tmp_path, overrides
):
    """Each process gets a signal in its first micro-batch, so it does one step, saves and ends: a
    run of n steps is resumed n - 1 times, from each of its steps."""
    overrides = [f"trainer.max_steps={N_STEPS}", *overrides]
    experiment("whole", *overrides)
    stop_at(0, signal.SIGTERM, from_then_on=True)
    pieces = tmp_path / "pieces"
    for restarts in range(N_STEPS - 1):
        with pytest.raises(Interrupted):
            experiment("pieces", *overrides)
        record = RunRecord.load(pieces)
        assert (record.run_status, record.restarts) == ("interrupted", restarts)
        assert record.step == restarts + 1
        last = read_checkpoint(RunDirectory(pieces).checkpoint("last"))
        assert last["global_step"] == restarts + 1
        assert nerve.load_metrics(pieces).step.max() <= restarts + 1
    # In the last step a signal comes too late to interrupt anything, but ends the command.
    with pytest.raises(Interrupted):
        experiment("pieces", *overrides)
    last = RunRecord.load(pieces)
    assert (last.run_id, last.restarts) == (record.run_id, N_STEPS - 1)
    assert_same("whole", "pieces")


def test_an_image_classifier_resumes_just_as_exactly(
    tmp_path, monkeypatch, run, stop_at, assert_same
):
    """Through the command; the final scores of a resumed run include the accuracy."""
    mixer = ["model=mixer_tiny", "model.n_layers=1", "model.d_model=16", "data.batch_size=64"]
    mixer += ["trainer.max_steps=3", "monitor.every_n_steps=2", "trainer.log_every_n_steps=1"]
    mixer += ["trainer.enable_progress_bar=false", "threads=1"]
    assert run(*mixer, "hydra.run.dir=whole")[0] == 0
    stop_at(0, signal.SIGTERM, from_then_on=True)
    for _ in range(3):
        assert run(*mixer, "hydra.run.dir=pieces")[0] == 128 + signal.SIGTERM
    assert "val_accuracy" in RunRecord.load("pieces").final
    assert_same("whole", "pieces")


def test_a_run_killed_after_saving_its_last_step_only_has_to_be_recorded_as_done(
    experiment, assert_same, monkeypatch, tmp_path
):
    """Nothing is left to train; scores and rows come from the checkpoint."""
    experiment("whole")

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            experiment("pieces")
    assert RunRecord.load(tmp_path / "pieces").run_status == "running"
    experiment("pieces")
    assert_same("whole", "pieces")


def test_a_run_killed_after_stopping_early_does_not_train_further(
    experiment, assert_same, monkeypatch
):
    stop = ["+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping"]
    stop += ["+callbacks.stop.monitor=val_loss", "+callbacks.stop.stopping_threshold=1e9"]
    experiment("whole", *stop)
    assert RunRecord.load("whole").step == 2  # of 5: the first validation in training stops it

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            experiment("pieces", *stop)
    experiment("pieces", *stop)
    assert_same("whole", "pieces")


@pytest.fixture
def fail_in_step_4(stop_at, go_on) -> Callable[[Callable[[], float]], None]:
    """Makes a run fail after its third step."""

    def fail(start: Callable[[], float]) -> None:
        stop_at(3, MemoryError("none left"))
        with pytest.raises(MemoryError):
            start()
        go_on()

    return fail


def test_weights_kept_after_the_last_checkpoint_are_written_again(
    experiment, fail_in_step_4, assert_same, tmp_path
):
    """The last checkpoint is that of step 2, so step 3 is repeated."""
    experiment("whole", "checkpoint.keep=[1,3]")
    keep = ["checkpoint.keep=[1,3]", "checkpoint.every_n_steps=2"]
    fail_in_step_4(lambda: experiment("pieces", *keep))
    last = read_checkpoint(RunDirectory(tmp_path / "pieces").checkpoint("last"))
    run = RunDirectory("pieces")
    assert (run.kept_steps(), last["global_step"]) == ([1, 3], 2)
    run.kept_checkpoint(3).write_bytes(b"weights that the steps done again do not lead to")
    experiment("pieces", *keep, "retry=true")
    assert_same("whole", "pieces")


@pytest.mark.parametrize(("every", "left"), [("2", [1, 5]), ("null", [5])])
def test_weights_kept_after_the_step_of_the_resume_are_dropped(
    experiment, fail_in_step_4, every, left
):
    """The rows of these steps are dropped; without a checkpoint, those of all steps."""
    cadence = f"checkpoint.every_n_steps={every}"
    fail_in_step_4(lambda: experiment("run", "checkpoint.keep=[1,3]", cadence))
    assert RunDirectory("run").kept_steps() == [1, 3]
    experiment("run", "checkpoint.keep=[5]", cadence, "retry=true")
    assert RunDirectory("run").kept_steps() == left


def test_a_step_to_keep_that_is_already_past_is_named(experiment, stop_at, go_on, caplog):
    stop_at(2, signal.SIGTERM)
    with pytest.raises(Interrupted):
        experiment("run")
    go_on()
    experiment("run", "checkpoint.keep=[2,3,4]")
    assert (
        "resumes at step 3, after steps 2 in checkpoint.keep: their weights are not" in caplog.text
    )
    assert RunDirectory("run").kept_steps() == [3, 4]


def test_the_weights_of_step_0_are_the_initial_ones(experiment, tmp_path):
    """They are kept when the run is done, like the last ones, from which they differ."""
    experiment("run", "checkpoint.keep=[0,5]")
    record = RunRecord.load("run")
    assert record.run_status == "done"
    first, final = (nerve.load_model("run", step=step).state_dict() for step in (0, 5))
    data_dims = read_checkpoint(RunDirectory("run").kept_checkpoint(0))["facts"]
    built = build_model(record.config, seed=record.config["seed"], **data_dims).state_dict()
    last = nerve.load_model("run", "last").state_dict()
    assert all(torch.equal(first[name], built[name]) for name in built)
    assert all(torch.equal(final[name], last[name]) for name in last)
    assert any(not torch.equal(first[name], last[name]) for name in last)
    assert nerve.load_tokenizer("run").get_vocab_size() == data_dims["vocab_size"]


def test_steps_to_keep_beyond_the_end_are_refused_before_data_is_read(experiment):
    with pytest.raises(ConfigError, match=r"got 6 with trainer\.max_steps=5"):
        experiment("run", "checkpoint.keep=[5,6]", "data.corpus.roots=[nowhere]")


def test_the_cadence_of_checkpoints_changes_nothing(experiment, assert_same, tmp_path):
    experiment("whole")
    experiment("often", "checkpoint.every_n_steps=1")
    assert_same("whole", "often")
    ids = {RunRecord.load(tmp_path / name).config_id for name in ("whole", "often")}
    assert len(ids) == 1


@pytest.mark.cuda
def test_on_a_gpu_a_resumed_run_has_the_rows_of_an_undisturbed_one(
    experiment, stop_at, go_on, tmp_path
):
    """In bfloat16 with dropout; not bit for bit, because kernels may sum in another order."""
    gpu = ["trainer=gpu", "model.dropout=0.2", "trainer.max_steps=9", "monitor.source=train"]
    experiment("whole", *gpu)
    for stop in (3, 6):
        stop_at(stop - 1, signal.SIGTERM)
        with pytest.raises(Interrupted):
            experiment("pieces", *gpu)
        last = read_checkpoint(RunDirectory(tmp_path / "pieces").checkpoint("last"))
        assert last["global_step"] == stop
    go_on()
    experiment("pieces", *gpu)
    whole, pieces = (nerve.load_metrics(tmp_path / name) for name in ("whole", "pieces"))
    keys = ["step", "layer", "tokens_seen", "n_samples"]
    assert whole[keys].to_numpy().tolist() == pieces[keys].to_numpy().tolist()
    for name in ("se_pre", "se_post", "train_loss", "val_loss"):
        assert pieces[name].to_numpy() == pytest.approx(
            whole[name].to_numpy(), rel=1e-3, nan_ok=True
        )
    for which in ("best", "last"):
        a, b = (nerve.load_model(tmp_path / name, which) for name in ("whole", "pieces"))
        for one, other in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


STOPPING = """
import os, signal
import lightning as L
from nerve.training import agreement

agreement.MOST_STEPS, agreement.DECIDES_WITHIN_S = 2, 1e9  # after steps 1, 3 and 5

class Stop(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if [str(trainer.global_rank), str(batch_idx)] == os.environ.get("STOP", "").split():
            os.kill(os.getpid(), signal.SIGTERM)
"""


def test_two_processes_stop_at_the_same_step_even_if_one_got_the_signal(
    small, assert_same, tmp_path
):
    """The second process is asked to stop, in its second step; both save after the third, when they
    ask each other again, end, and go on."""
    (tmp_path / "stopping.py").write_text(STOPPING)
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    two += ["trainer.precision=32-true", "model.dropout=0.2"]
    two += ["+callbacks.stop._target_=stopping.Stop", "checkpoint.keep=[0,1,4]"]

    def launch(name: str, stop: str) -> tuple[list[int], str]:
        where = {"PYTHONPATH": str(tmp_path), "STOP": stop}
        return ranks(2, [*small, *two, f"hydra.run.dir={name}"], tmp_path, **where)

    statuses, output = launch("whole", "")
    assert statuses == [0, 0], output
    statuses, output = launch("pieces", "1 1")
    assert statuses == [128 + signal.SIGTERM, 0], output  # that of the run is the first one's
    record = RunRecord.load(tmp_path / "pieces")
    assert (record.run_status, record.step) == ("interrupted", 3)
    states = read_checkpoint(RunDirectory(tmp_path / "pieces").checkpoint("last"))["callbacks"]
    masks = []
    for random in states["Checkpointing"]["random"]:
        torch.set_rng_state(random["torch"])
        masks.append(torch.rand(4))
    assert not torch.equal(*masks)  # what they drop out
    statuses, output = launch("pieces", "")
    assert statuses == [0, 0], output
    assert_same("whole", "pieces")
    # What the first one refuses, the other one does not wait for.
    RunRecord.load(tmp_path / "pieces").update(run_status="failed")
    statuses, output = launch("pieces", "")
    assert statuses == [1, 1], output
    assert output.count("which failed with an error") == 2, output


FAILING = """
import lightning as L

class Fail(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.global_rank, batch_idx) == (1, 1):
            raise ValueError("of the second")
"""


def test_the_first_process_records_why_another_one_has_failed(small, tmp_path):
    """It waits in a collective, of which torch says no more than that a connection was closed."""
    (tmp_path / "failing.py").write_text(FAILING)
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    two += ["trainer.precision=32-true", "+callbacks.fail._target_=failing.Fail"]
    where = {"PYTHONPATH": str(tmp_path)}
    statuses, output = ranks(2, [*small, *two, "hydra.run.dir=it"], tmp_path, **where)
    assert statuses == [1, 1], output
    record = RunRecord.load(tmp_path / "it")
    assert record.run_status == "failed"
    assert record.error["type"] == "NotGatheredError"
    assert "process 1 has stopped: ValueError: of the second" in record.error["message"]


LEAVING = """
import os
import lightning as L
from nerve.training import agreement

asked = agreement.gathered

def leave(value):
    if os.environ.get("LOCAL_RANK") == "1" and os.environ["LEAVES"]:
        exec(os.environ["LEAVES"])
    return asked(value)

agreement.gathered = leave

class Leave(L.Callback):
    pass
"""


ENDS = [
    ("os.kill(os.getpid(), 9)", ("failed", "NotGatheredError", "1 was killed by SIGKILL")),
    ("raise ValueError('mine')", ("failed", "NotGatheredError", "stopped: ValueError: mine")),
    ("os.kill(os.getpid(), 2); os.kill(os.getpid(), 2)", ("interrupted", "Interrupted", "SIGINT")),
]


def test_a_run_is_recorded_whatever_ends_a_process_that_the_first_has_started(
    small, assert_same, tmp_path
):
    """While the first one waits for it, in an exchange of nerve's own; and resumed each time, it
    ends as if nothing had been."""
    (tmp_path / "leaving.py").write_text(LEAVING)
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "retry=true"]
    two += ["trainer.precision=32-true", "+callbacks.leave._target_=leaving.Leave"]

    def launch(name: str, leaves: str) -> tuple[int, str]:
        where = {"PYTHONPATH": str(tmp_path), "LEAVES": leaves}
        process = launched([*small, *two, f"hydra.run.dir={name}"], tmp_path, **where)
        return ended(process), Path(process.name).read_text()

    for leaves, (run_status, kind, message) in ENDS:
        began = time.monotonic()
        status, output = launch("pieces", leaves)
        assert status, output
        assert time.monotonic() - began < BELIEVED_AFTER_S, output
        record = RunRecord.load(tmp_path / "pieces")
        assert (record.run_status, record.error["type"]) == (run_status, kind), output
        assert message in record.error["message"]
    for name in ("whole", "pieces"):
        status, output = launch(name, "")
        assert status == 0, output
    assert_same("whole", "pieces")


def test_the_pre_activations_are_scaled_only_once(
    experiment, stop_at, go_on, assert_same, monkeypatch, tmp_path
):
    """A run that died before its first checkpoint begins anew, with the same factors."""
    experiment("whole", "model.pre_std=1")
    scales = RunRecord.load(tmp_path / "whole").pre_scales
    assert list(scales) == ["ffn/00", "ffn/01"]
    first = nerve.load_metrics(tmp_path / "whole").query("step == 0")
    # Held-out tokens instead of the first batch of 64.
    sizes = (first.variance_pre / first.d_ff) ** 0.5
    assert sizes.tolist() == pytest.approx([1, 1], rel=0.2)
    stop_at(0, MemoryError("none left"))
    with pytest.raises(MemoryError):
        experiment("pieces", "model.pre_std=1")
    assert not RunDirectory(tmp_path / "pieces").checkpoint("last").exists()
    go_on()
    stop_at(2, signal.SIGTERM)
    with pytest.raises(Interrupted):
        experiment("pieces", "model.pre_std=1", "retry=true")
    go_on()
    monkeypatch.setattr(build, "scale_pre", lambda *_: pytest.fail("it was done again"))
    experiment("pieces", "model.pre_std=1")
    assert RunRecord.load(tmp_path / "pieces").pre_scales == scales
    assert_same("whole", "pieces")
