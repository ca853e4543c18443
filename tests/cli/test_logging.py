"""What users see in addition to the tables: loggers of a run, and callbacks that monitor it."""

import csv
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from processes import ranks
from support import TINY_RUN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nerve
from nerve.cli.experiment import build as assembly
from nerve.metric_names import MEASURED
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.training.checkpoint_files import read_checkpoint

TINY = [*TINY_RUN, "hydra.run.dir=it"]
STEPS = [0, 2, 4, 5]


def measured(name: str, directory: str | Path = "it") -> dict[int, float]:
    """The logged values of a name by step, from the stored rows."""
    ffn, layer, column = name.split("/")
    rows = nerve.load_metrics(directory).query(f"ffn == {ffn!r}")
    if layer != "mean":
        rows = rows[rows.layer == int(layer)]
    return rows.groupby("step")[column].mean().to_dict()


def test_the_csv_file_has_a_column_for_each_metric_of_each_layer(run):
    assert run(*TINY)[0] == 0
    with open("it/logs/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for metric in MEASURED:
        for name in (f"ffn/00/{metric}", f"ffn/01/{metric}", f"ffn/mean/{metric}"):
            column = {int(row["step"]): float(row[name]) for row in rows if row[name]}
            assert list(column) == STEPS
            assert column == pytest.approx(measured(name), rel=1e-15)
    assert len([row for row in rows if row["train_loss"]]) == 5
    assert not [name for name in nerve.load_scalars("it").name if "/" in name]


def test_tensorboard_shows_layers_losses_and_the_configuration(run):
    """Read from the event file; a Mixer has two kinds of FFN."""
    of_text = ("data.", "model.n_heads", "model.seq_len", "monitor.n_tokens")
    rest = [value for value in TINY if not value.startswith(of_text)]
    mixer = ["model=mixer_tiny", "data.batch_size=8", *rest]
    status, _, err = run(*mixer, "logger=[csv,tensorboard]")
    assert (status, err) == (0, "")
    assert Path("it/logs/metrics.csv").exists()
    events = EventAccumulator("it/logs/tensorboard").Reload()
    names = set(events.Tags()["scalars"])
    assert {"train_loss", "val_loss", "val_accuracy"} <= names
    for name in ("token_mixing/00/se_pre", "channel_mixing/01/pr_post", "token_mixing/mean/js"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert list(shown) == STEPS
        assert shown == pytest.approx(measured(name), rel=1e-6)
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"normalization/kind" in content
    assert b"layernorm" in content


def logged_records(file: bytes) -> Iterator[bytes]:
    """The records of a file of wandb, LevelDB's log format after seven bytes: blocks of 32 KiB with
    pieces of records, each behind its checksum, length, and whether it is all (1) or the last (4).
    """
    position, record = 7, b""
    while position < len(file):
        left = 2**15 - position % 2**15
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", file, position)
        position += 7 + length
        record += file[position - length : position]
        if kind in (1, 4):
            yield record
            record = b""


def test_a_wandb_run_has_the_values_and_the_configuration_of_the_run(run, monkeypatch):
    """Read from the file that wandb would upload; the next run in the process has its own."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("it", "other"):
        assert run(*TINY, "logger=wandb", f"hydra.run.dir={name}")[0] == 0
        assert wandb.run is None
        run_id = RunRecord.load(name).run_id
        (path,) = Path(name).glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
        records = [Record.FromString(data) for data in logged_records(path.read_bytes())]
        (begun,) = (record.run for record in records if record.HasField("run"))
        assert (begun.run_id, begun.project) == (run_id, "nerve")
        config = {}
        for record in records:
            for part in (record.run.config, record.config):
                config |= {item.key: json.loads(item.value_json) for item in part.update}
        assert config["model"]["d_model"] == 16
        shown = {}
        for record in records:
            items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            if "ffn/01/pr_post" in items:
                shown[json.loads(items["trainer/global_step"])] = json.loads(
                    items["ffn/01/pr_post"]
                )
        assert shown == pytest.approx(measured("ffn/01/pr_post", name), rel=1e-15)
        assert list(shown) == STEPS


@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_a_logger_that_is_not_installed_is_named_with_its_extra(run, monkeypatch, logger):
    monkeypatch.setitem(sys.modules, logger, None)
    status, _, err = run(*TINY, f"logger=[csv,{logger}]")
    assert status == 1
    assert f"logger={logger} needs {logger}, which is not" in err
    assert f'pip install -c constraints.txt -e ".[{logger}]"' in err
    assert not Path("it/run.json").exists()


def test_a_logger_that_cannot_start_fails_the_run_with_its_reason(run, monkeypatch):
    class Refusing(assembly.StoreLogger):
        def log_hyperparams(self, *args):
            raise ConnectionError("no login")

    monkeypatch.setattr(assembly, "StoreLogger", Refusing)
    status, _, err = run(*TINY)
    assert status == 1
    assert "Refusing could not: no login" in err
    assert RunRecord.load("it").run_status == "failed"


@pytest.mark.parametrize("monitor", ["val_loss", "pr_post"])
def test_a_run_that_is_stopped_early_is_done(run, monitor):
    stop = [
        "+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping",
        f"+callbacks.stop.monitor={monitor}",
        "+callbacks.stop.min_delta=1000",
        "+callbacks.stop.patience=1",
    ]
    status, _, err = run(*TINY, *stop)
    assert (status, err) == (0, "")
    record, metrics = RunRecord.load("it"), nerve.load_metrics("it")
    assert (record.run_status, record.step, metrics.step.max()) == ("done", 4, 4)
    assert record.final["val_loss"] == metrics[metrics.step == 4].val_loss.iloc[0]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_weights_with_the_best_mean_over_layers_can_be_kept(run, mode):
    """In addition to the run's checkpoints, and exactly those of that step."""
    keep = [
        "+callbacks.keep._target_=lightning.pytorch.callbacks.ModelCheckpoint",
        "+callbacks.keep.monitor=pr_post",
        f"+callbacks.keep.mode={mode}",
        "+callbacks.keep.filename=chosen",
    ]
    status, _, err = run(*TINY, *keep)
    assert (status, err) == (0, "")
    means = nerve.load_metrics("it").query("step > 0").groupby("step").pr_post.mean()
    chosen = torch.load("it/checkpoints/chosen.ckpt", weights_only=True)
    assert chosen["global_step"] == (means.idxmin() if mode == "min" else means.idxmax())
    assert read_checkpoint(RunDirectory("it").checkpoint("last"))["step"] == 5


def test_files_between_validations_are_named_by_their_step_and_scalars_keep_theirs(run):
    """Validated at 4, 8 and 10, saved at 3, 6 and 9: no two have the same name."""
    keep = [
        "+callbacks.keep._target_=lightning.pytorch.callbacks.ModelCheckpoint",
        "+callbacks.keep.every_n_train_steps=3",
        "+callbacks.keep.save_top_k=-1",
        "+callbacks.keep.filename='{step}'",
    ]
    cadence = ["trainer.max_steps=10", "monitor.every_n_steps=4"]
    accumulate = "trainer.accumulate_grad_batches=2"  # batches are no steps
    status, _, err = run(*TINY, *cadence, accumulate, *keep, "logger=[csv,tensorboard]")
    assert (status, err) == (0, "")
    saved = {
        path.stem: torch.load(path, weights_only=True)["global_step"]
        for path in Path("it/checkpoints").glob("step=*.ckpt")
    }
    assert saved == {"step=3": 3, "step=6": 6, "step=9": 9}
    with open("it/logs/metrics.csv", newline="") as file:
        in_csv = [int(row["step"]) for row in csv.DictReader(file) if row["val_loss"]]
    events = EventAccumulator("it/logs/tensorboard").Reload().Scalars("val_loss")
    in_store = nerve.load_scalars("it").query("name == 'val_loss'").step
    assert in_csv == [event.step for event in events] == in_store.tolist() == [4, 8, 10]


def test_processes_monitor_the_same_means(tmp_path):
    """Only one of them has the rows, but both must stop; the other would wait forever. What both
    know only the first says."""
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", *TINY]
    two += ["trainer.precision=32-true", "objective=ffn/mean/js", "logger=tensorboard"]
    stop = ["callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping"]
    stop += ["callbacks.stop.monitor=js", "callbacks.stop.stopping_threshold=1"]
    statuses, output = ranks(2, [*two, *(f"+{value}" for value in stop)], tmp_path)
    assert statuses == [0, 0], output
    for said in ("data: ", "training ended at step 2: "):
        assert output.count(said) == 1, output
    assert "Initializing distributed" not in output
    directory = tmp_path / "it"
    assert nerve.load_metrics(directory).step.unique().tolist() == [0, 2]
    events = EventAccumulator(str(directory / "logs" / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("ffn/mean/js")}
    assert shown == pytest.approx(measured("ffn/mean/js", directory), rel=1e-6)


def test_lightning_says_why_it_ends_all_processes_of_a_run(run, monkeypatch, caplog):
    """It kills them, so nothing else can."""
    monkeypatch.setattr(_ChildProcessObserver, "_terminate_all", lambda _: None)
    assert run(*TINY)[0] == 0
    failed = SimpleNamespace(pid=7, returncode=1, poll=lambda: 1)
    assert _ChildProcessObserver(1, [failed])._run()
    assert "Child process with PID 7 terminated with code 1" in caplog.text


def test_an_unknown_name_to_monitor_is_refused_with_the_known_ones(run):
    stop = "+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping"
    status, _, err = run(*TINY, stop, "+callbacks.stop.monitor=pr_past")
    assert status == 1
    assert "pr_past" in err
    assert "pr_post" in err
