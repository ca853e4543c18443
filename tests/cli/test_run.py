"""`nerve-run`, as a user calls it: what a run stores, and its messages for bad input."""

import errno
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.errors import HydraException
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import OmegaConf
from processes import lean_path
from support import TINY_RUN, composed
from torch.utils._python_dispatch import TorchDispatchMode

import nerve
import nerve.cli.run as run_module
from nerve.cli import entry
from nerve.cli.config.compose import CONF, SWEEPS
from nerve.cli.config.explain import explain_error
from nerve.cli.config.overrides import check_added, overrides_of
from nerve.cli.experiment.build import build_trainer
from nerve.cli.experiment.plan import Plan
from nerve.errors import ConfigError, StoreError
from nerve.storage.store import RunStore
from nerve.training.checkpoint_io import CheckpointFiles
from nerve.training.module import LanguageModel

METRICS = ["se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js", "val_loss"]


@pytest.fixture
def tiny() -> list[str]:
    return [*TINY_RUN, "model.d_model=32", "model.seq_len=32"]


def only_run(directory: Path) -> Path:
    (record,) = directory.glob("**/run.json")
    return record.parent


def test_a_run_stores_everything_that_the_frames_read(run, tiny, tmp_path):
    status, out, _ = run(*tiny, "monitor.n_tokens=auto")
    assert status == 0
    directory = only_run(tmp_path / "outputs")
    metrics = nerve.load_metrics(directory, factors=["activation.name", "ffn.width"])
    assert sorted(metrics.step.unique()) == [0, 2, 4, 5]
    assert len(metrics) == 4 * 2
    assert (metrics.status == "ok").all()
    assert set(metrics["activation.name"]) == {"gelu"}
    assert (metrics.n_samples == 8 * 128).all()  # monitor.n_tokens=auto: 8 · d_ff
    assert ((metrics.d_ff == 128) & (metrics.d_in == 32)).all()
    assert len(nerve.load_spectra(directory)) == 2 * len(metrics)
    assert {"train_loss", "val_loss"} <= set(nerve.load_scalars(directory).name)
    assert (directory / "logs" / "metrics.csv").exists()
    for name in ("metrics", "spectra", "scalars"):
        assert len(list((directory / name).iterdir())) == 1  # compacted
    assert {path.name for path in (directory / ".hydra").iterdir()} == {
        "config.yaml",
        "hydra.yaml",
        "overrides.yaml",
    }

    runs = nerve.load_runs(tmp_path / "outputs")
    record = runs.iloc[0]
    last = metrics[metrics.step == 5].iloc[0]
    assert (record.run_status, record["trainer.max_steps"], record.step) == ("done", 5, 5)
    assert record["final.val_loss"] == last.val_loss
    assert record.run_id in directory.name
    assert record.n_parameters == 2 * 300 * 32 + 32 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32

    # What the user sees at the end.
    assert f"validation loss: {last.val_loss:.3f} nats per target" in out
    bits = re.search(r"([\d.]+) bits per byte", out)
    assert bits
    assert float(bits[1]) == pytest.approx(record["final.bits_per_byte"], abs=5e-4)
    assert str(directory) in out
    (line,) = re.findall(r"in a notebook: (.*)", out)
    frame: dict = {}
    exec(line, frame)
    pd.testing.assert_frame_equal(frame["metrics"], nerve.load_metrics(directory))


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(run, tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(*tiny, f"seed={seed}", f"hydra.run.dir={name}")[0] == 0
    a, b, c = (nerve.load_metrics(tmp_path / name)[METRICS] for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert (a != c).any(axis=None)
    runs = nerve.load_runs(tmp_path).set_index("directory")
    held = runs["fingerprints.heldout"]
    assert held.nunique() == 1  # the held-out set does not depend on the seed
    assert runs.config_id.nunique() == 2


def test_training_tokens_can_be_measured_instead_of_held_out_ones(run, tiny, tmp_path):
    assert run(*tiny, "monitor.source=train", "logger=none")[0] == 0
    metrics = nerve.load_metrics(tmp_path)
    assert sorted(metrics.step.unique()) == [0, 2, 4]
    assert (metrics.n_samples == 4 * 32).all()
    assert nerve.load_runs(tmp_path)["final.val_loss"].notna().all()


def test_a_single_layer_can_be_measured(run, tiny, tmp_path):
    assert run(*tiny, "monitor.layers=[1]", "monitor.shortcut=false")[0] == 0
    assert nerve.load_metrics(tmp_path).layer.unique().tolist() == [1]


def test_a_trial_of_a_multirun_leaves_the_same_as_a_single_run(run, tiny, monkeypatch):
    """Its separate process changes no bit; the repeated command starts none."""
    monkeypatch.setenv("PYTHONPATH", lean_path())
    design = [*tiny, "activation=relu", "logger=none"]
    assert run(*design, "hydra.run.dir=single")[0] == 0
    status, out, _ = run("-m", *design)
    assert status == 0
    assert "sweep outputs/multirun: 1 trial, 1 new; 1 to run" in out
    (single,) = nerve.load_runs("single").itertuples()
    (trial,) = nerve.load_runs("outputs/multirun").itertuples()
    assert (trial.sweep, trial.config_id) == ("multirun", single.config_id)
    assert Path(trial.directory).name == trial.config_id
    np.testing.assert_array_equal(
        nerve.load_metrics("single")[METRICS], nerve.load_metrics("outputs/multirun")[METRICS]
    )
    before = Path(trial.directory, "run.json").read_bytes()
    status, out, _ = run("-m", *design)
    assert status == 0
    assert "1 trial, 1 done; 0 to run" in out
    assert before == Path(trial.directory, "run.json").read_bytes()


def test_threads_and_loggers_do_not_define_a_result(run, tiny, tmp_path):
    for name, override in (("a", "threads=1"), ("b", "logger=none")):
        assert run(*tiny, override, f"hydra.run.dir={name}")[0] == 0
    assert nerve.load_runs(tmp_path).config_id.nunique() == 1


COMPOSITION = [
    (["activatoin=relu"], ["activatoin"]),
    (["optimizer.lrr=1"], ["no value 'optimizer.lrr'. Did you mean 'optimizer.lr'?"]),
    (["optimizer.nesterov=1"], ["There is no value 'optimizer.nesterov'. nerve-run --cfg job"]),
    (["optimizer.momentum=0.9"], ["selected options have no value 'optimizer.momentum'", "=dion."]),
    (["lr=1e-3"], ["no value 'lr'. Did you mean 'optimizer.lr'?"]),
    (["data.paths=a"], ["no value 'data.paths'. Did you mean 'data.corpus.paths'?"]),
    (["kind=x"], ["no value 'kind'. nerve-run --cfg job"]),
    (["activaton=relu"], ["no value 'activaton'. Did you mean 'activation'?"]),
    (["hydra.swep.dir=x"], ["no value 'hydra.swep.dir'. Did you mean 'hydra.sweep.dir'?"]),
    (["+activation=relu"], ["activation has an option already; choose another with activation=…"]),
    (["activation=gelo"], ["got 'gelo'", "activation=gelu"]),
]
ADDED = [
    ("+activaton=relu", ["+activaton adds a value that nothing", "mean 'activation'?"]),
    ("+optimizer.beta1=0.5", ["+optimizer.beta1 adds a value that nothing reads. nerve-run"]),
    ("+trainer.max_epochs=1", ["+trainer.max_epochs would be ignored: trainer.max_steps"]),
    ("++trainer.logger._target_=x", ["+trainer.logger._target_ would be", "the group logger"]),
]
COMMANDS = [
    (["optimizer.lrr=1"], ["no value 'optimizer.lrr'. Did you mean 'optimizer.lr'?"]),
    (["+activaton=relu"], ["+activaton adds a value that nothing"]),
    (["--config-name=nrmfree"], ["--config-name must be one of activation", "mean 'normfree'?"]),
    (["-m", "--cfg=job"], ["Only one of --run, --multirun, --cfg"]),
    (["hydra/sweeper=cells", "-m"], ["got 'cells'", "called hydra/sweeper=trials"]),
    (["hydra/launcher=slurm"], ["hydra/launcher=slurm would be ignored", "Add -m"]),
    (["hydra.sweep.dir=x"], ["got hydra.sweep.dir=x with a single run, which would ignore it"]),
    (["hydra.sweeper.n_jobs=2", "check=true"], ["got hydra.sweeper.n_jobs=2 with a single run"]),
    (["hydra.run.dir=x", "-m"], ["got hydra.run.dir=x, which would be ignored. Set hydra.sweep"]),
    (["hydra.run.dir=/proc/nerve"], ["output directory must be writable", "/proc/nerve"]),
    (["model.n_heads=3"], ["model.d_model=32", "model.n_heads=3"]),
    (["data.batch_size=0"], ["data.batch_size must be a whole number of at least 1; got 0"]),
]
DATA = [
    (["monitor.n_tokens=10000000"], ["10000000", "validation split"]),
    (["model.seq_len=1000000"], ["model.seq_len", "1000001"]),
    (["data.corpus.roots=[/nowhere]"], ["/nowhere"]),
    (["data.corpus.roots=[{empty}]"], ["{empty}"]),
]


def test_the_version_of_nerve_is_printed_before_that_of_hydra(monkeypatch, capsys):
    monkeypatch.setattr(entry, "import_module", lambda name: SimpleNamespace(main=lambda: None))
    monkeypatch.setattr(sys, "argv", ["nerve-run", "--version"])
    entry.run()
    assert capsys.readouterr().out == f"nerve {metadata.version('nerve')}\n"


def test_a_closed_pipe_ends_a_command_with_a_message(monkeypatch, capsys):
    """As in `nerve-run --help | head`, which once reported an unwritable output directory."""
    monkeypatch.setattr("os.dup2", lambda *descriptors: None)

    def no_reader():
        error = BrokenPipeError(errno.EPIPE, "Broken pipe")
        assert run_module._Command(show_tracebacks=False).message(error) is None
        raise error

    monkeypatch.setattr(entry, "import_module", lambda name: SimpleNamespace(main=no_reader))
    monkeypatch.setattr(sys, "argv", ["nerve-run", "--help"])
    with pytest.raises(SystemExit) as ended:
        entry.run()
    assert ended.value.code == entry.UNREAD
    assert "nothing reads its output" in capsys.readouterr().err


@pytest.mark.parametrize(("overrides", "expected"), COMPOSITION, ids=lambda v: " ".join(v)[:40])
def test_an_override_that_cannot_be_composed_is_answered_with_a_suggestion(overrides, expected):
    with pytest.raises(HydraException) as error:
        composed(*overrides, with_hydra=True)
    for text in expected:
        assert text in explain_error(error.value)


@pytest.mark.parametrize(("override", "expected"), ADDED)
def test_added_values_that_nothing_reads_are_refused(override, expected):
    with pytest.raises(ConfigError) as error:
        check_added(overrides_of([override]), [override])
    for text in expected:
        assert text in str(error.value)


@pytest.mark.parametrize(("overrides", "expected"), COMMANDS, ids=lambda v: " ".join(v)[:40])
def test_bad_input_gets_one_message_and_no_directory(run, tiny, tmp_path, overrides, expected):
    status, out, err = run(*tiny, *overrides)
    assert status == 1
    assert err.startswith("nerve-run: ")
    assert err.count("nerve-run: ") == 1
    assert "Traceback" not in err + out
    for text in expected:
        assert text in err
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize(("overrides", "expected"), DATA, ids=lambda v: " ".join(v)[:40])
def test_unsuitable_data_fail_the_run_before_training(run, tiny, tmp_path, overrides, expected):
    empty = tmp_path / "empty"
    empty.mkdir()
    status, out, err = run(*tiny, *(text.replace("{empty}", str(empty)) for text in overrides))
    assert status == 1
    assert err.startswith("nerve-run: ")
    assert "Traceback" not in err + out
    for text in expected:
        assert text.replace("{empty}", str(empty)) in err
    (record,) = tmp_path.glob("**/run.json")
    values = json.loads(record.read_text())
    assert values["run_status"] == "failed"
    assert values["error"]["message"] in err


def test_a_directory_with_a_finished_run_is_left_alone(run, tiny, tmp_path):
    assert run(*tiny, "hydra.run.dir=mine")[0] == 0
    before = {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}
    status, _, err = run(*tiny, "hydra.run.dir=mine", "seed=3")
    assert status == 1
    assert "holds run" in err
    assert "(done)" in err
    assert "Choose another directory with hydra.run.dir=…, or delete that one." in err
    assert before == {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}


def test_a_spectrum_dominated_by_a_few_samples_is_reported_at_the_end(run, tiny, monkeypatch):
    monkeypatch.setattr("nerve.derived.LARGEST_MOVES", 0.0)
    status, out, _ = run(*tiny)
    assert status == 0
    assert re.search(
        r"spectrum of post in layer 0 \(ffn\): the farthest sample holds \d+\.\d% of the", out
    )


def test_a_run_is_done_even_if_its_summary_cannot_be_printed(run, tiny, monkeypatch):
    """Because the disk with the log is full, or nobody reads the pipe."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("nerve.cli.experiment.summary.print_summary", refuse)
        with pytest.raises(OSError, match="No space left"):
            run(*tiny, "hydra.run.dir=mine")
    assert nerve.load_runs("mine").run_status.tolist() == ["done"]
    status, out, _ = run("resume=mine")
    assert status == 0
    assert "done" in out


def test_a_loss_that_is_not_finite_fails_the_run_and_keeps_its_rows(run, tiny, tmp_path):
    status, _, err = run(*tiny, "optimizer.lr=1e30", "trainer.gradient_clip_val=null")
    assert status == 1
    step = int(re.search(r"NaN or infinite at step (\d+)", err)[1])
    runs = nerve.load_runs(tmp_path)
    metrics = nerve.load_metrics(tmp_path)
    assert runs.run_status.tolist() == ["failed"]
    assert f"step {step}" in runs.error[0]
    assert 0 in metrics.step.tolist()
    assert metrics.step.max() <= step


class Dead(TorchDispatchMode):
    """No tensor can be read or made, as after an error of CUDA."""

    def __torch_dispatch__(self, *args, **kwargs):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nMore.")


@pytest.mark.parametrize("is_full", [False, True])
def test_a_device_that_fails_ends_the_run_with_one_message_and_keeps_its_rows(
    run, tiny, monkeypatch, is_full
):
    """What else fails as the run ends is said after it."""
    step = LanguageModel.training_step

    def refuse(store):
        raise StoreError("the disk is full")

    if is_full:
        monkeypatch.setattr(RunStore, "compact", refuse)
    with ExitStack() as stack:

        def failing(module, *args):
            if module.trainer.global_step == 3:
                stack.enter_context(Dead())
            return step(module, *args)

        monkeypatch.setattr(LanguageModel, "training_step", failing)
        status, _, err = run(*tiny, "hydra.run.dir=it")
    assert status == 1
    assert err.count("CUDA error: unspecified launch failure. What was measured") == 1
    assert "nerve-run resume=" in err
    assert "Traceback" not in err
    assert ("\nThen, as the run ended: StoreError: the disk is full" in err) == is_full
    record = nerve.RunRecord.load("it")
    assert (record.run_status, record.error["type"]) == ("failed", "DeviceError")
    assert sorted(nerve.load_metrics("it").step.unique()) == [0, 2]


def test_help_and_the_composed_values_are_shown_without_loading_torch(tmp_path):
    for arguments in (["--help"], ["--cfg", "job"]):
        code = (
            "import sys; from nerve.cli.run import main\n"
            f"sys.argv = ['nerve-run', *{arguments}]\n"
            "try: main()\nfinally: assert 'torch' not in sys.modules"
        )
        began = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        assert "every_n_steps: 25" in result.stdout
        assert time.perf_counter() - began < 30  # a hang, not the speed of a busy machine
    assert not list(tmp_path.iterdir())


def test_the_help_names_every_sweep_and_the_default_options(run):
    _, out, _ = run("--help")
    default = re.search(r"The default run: (.*?)\.\n", out, re.DOTALL)[1].split()
    chosen = OmegaConf.load(CONF / "config.yaml").defaults
    assert default == [
        f"{group}={option}"
        for group, option in (
            (k, v) for each in chosen if each != "_self_" for k, v in each.items()
        )
        if not group.startswith("override")
    ]
    listed = re.search(r"Sweeps \(--config-name=…\): (.*?)\.\n", out, re.DOTALL)[1]
    assert re.split(r",\s+", listed) == sorted(path.stem for path in SWEEPS.glob("*.yaml"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["+x=0.1", "optimizer.lr=${x}"],
        ["+optimizer.beta1=0.8", "optimizer.parts.main.build.betas=[${optimizer.beta1},0.95]"],
        ["hydra.searchpath=[file:///nowhere]", "+mine=1"],
        ["+scale=gpu"],
        ["++optimizer.lr=0.1"],
        ["+optimizer.parts.main.build.amsgrad=true"],
        ["+callbacks.stop._target_=x"],
        ["+trainer.limit_val_batches=0.5", "+trainer.num_nodes=2"],
    ],
)
def test_values_that_may_be_read_can_be_added(arguments):
    check_added(overrides_of(arguments), arguments)


def test_values_that_the_run_sets_itself_cannot_be_added(monkeypatch):
    """All that the trainer gets in addition to the configuration, and what the monitor sets."""
    given: dict = {}

    def build_nothing(node, *, key, **arguments):
        given.update(arguments)
        raise ConfigError("that will do")

    plan = Plan.of(composed("logger=none", "trainer.enable_progress_bar=false"))
    monkeypatch.setattr("nerve.cli.experiment.build.build", build_nothing)
    with pytest.raises(ConfigError, match="that will do"):
        build_trainer(plan, Path(), None, [], CheckpointFiles(), LightningEnvironment())
    own = given.keys() - plan.values["trainer"].keys()
    assert "max_epochs" in own
    for key in [*own, "val_check_interval", "check_val_every_n_epoch", "num_sanity_val_steps"]:
        arguments = [f"+trainer.{key}=1", "optimizer.lr=${x}"]
        with pytest.raises(ConfigError, match=rf"\+trainer\.{key} would be ignored: "):
            check_added(overrides_of(arguments), arguments)


def test_check_shows_what_would_run_and_runs_nothing(run, tiny, tmp_path, monkeypatch):
    """For one run, a sweep with a refused trial, and a shipped sweep."""

    def refuse(*args, **kwargs):
        pytest.fail("it reads data")

    monkeypatch.setattr("nerve.data.text.TextDataModule.setup", refuse)
    status, out, err = run(*tiny, "check=true", "hydra.run.dir=mine")
    assert (status, err) == (0, "")
    n = 2 * 300 * 32 + 32 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    assert f"{n:,}" in out
    assert "what would run in mine" in out
    assert "dash" not in out  # as there is none
    status, out, err = run(*tiny, "check=true", "model.n_heads=3")
    assert status == 1
    assert err.startswith("nerve-run: model.d_model must be a multiple of model.n_heads")
    status, out, err = run("-m", *tiny, "check=true", "model.n_heads=2,3,4,2")
    assert status == 1
    assert "4 trials: 2 new, 1 refused, 1 repeated; 2 to run. Nothing was started." in out
    assert "1 of 4 trials in outputs/multirun are refused" in err
    assert "1: model.d_model must be a multiple of model.n_heads" in err
    assert "no overrides" in run("check=true")[1]
    assert run("--config-name=optimizer", "check=true")[0] == 0
    assert not list(tmp_path.iterdir())


def test_check_recognizes_completed_runs(run, tiny, tmp_path):
    assert run(*tiny, "hydra.run.dir=mine")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, out, _ = run(*tiny, "hydra.run.dir=mine", "check=true")
    assert status == 0
    assert "1 trial: 1 done; 0 to run" in out
    assert "1 done; 0 to run" in run("resume=mine", "check=true")[1]
    status, _, err = run(*tiny, "hydra.run.dir=mine", "check=true", "seed=3")
    assert status == 1
    assert "other values of seed" in err
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_missing_sweep_of_the_user_is_explained_by_hydra(run, tmp_path):
    (tmp_path / "my").mkdir()
    _, _, err = run("--config-dir=my", "--config-name=onw")
    assert err.startswith("nerve-run: Cannot find primary config 'onw'")


def test_a_missing_gpu_is_refused_by_name(run, tiny, monkeypatch):
    monkeypatch.setattr("nerve.cli.experiment.machine.CUDAAccelerator.is_available", lambda: False)
    status, _, err = run(*tiny, "trainer=gpu")
    assert status == 1
    assert "trainer.accelerator=gpu needs a GPU" in err
    assert "Use trainer=cpu" in err


def test_the_unigram_loss_is_recorded(run, tiny, tmp_path):
    """An untrained model has a higher loss than the unigram distribution."""
    assert run(*tiny)[0] == 0
    record = nerve.load_runs(tmp_path).iloc[0]
    first = nerve.load_metrics(tmp_path).sort_values("step").val_loss.iloc[0]
    assert record.unigram_loss < first
    assert first == pytest.approx(math.log(300), rel=0.05)


def test_a_file_and_a_cache_whose_names_are_not_utf_8_are_read_and_logged(
    run, monkeypatch, tmp_path
):
    """On a terminal, whose stdout accepts only valid text."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    lines = "".join(f"line {i} of a long text\n" for i in range(4000))
    (folder / os.fsdecode(b"t\xe9.txt")).write_text(f"{lines}<|endoftext|>\n")
    monkeypatch.setenv("NERVE_CACHE", str(folder / "cache"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    given = ["data=text_files", "data.corpus.paths=caf*/*.txt"]
    status, _, err = run(*given, *TINY_RUN[1:], "hydra.run.dir=it")
    assert (status, err) == (0, "")
    sys.stdout.flush()
    shown = sys.stdout.buffer.getvalue()
    assert b"caf\\udce9/t\\udce9.txt has '<|endoftext|>'" in shown
    assert b"Logging error" not in shown
    assert nerve.load_tokenizer("it").get_vocab_size() == 300
