"""Command lines that are refused: the messages, and that nothing is left behind."""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec, module_from_spec
from pathlib import Path

import pytest
from hydra import compose
from hydra._internal import config_loader_impl
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from support import hydra_at_conf

from nerve.cli import entry
from nerve.cli.config.explain import explain_error
from nerve.cli.config.overrides import overrides_of, require_directories, with_literal_paths
from nerve.errors import ConfigError, NerveError

LONG = 300 * "n"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        *(
            (f"{key}=''", f"{key} must name a file or a folder; got ''")
            for key in (
                "hydra.run.dir",
                "hydra.sweep.dir",
                "hydra.sweep.subdir",
                "resume",
            )
        ),
        ("hydra.run.dir=", "hydra.run.dir must name"),
        ("hydra.run.dir=' '", "hydra.run.dir must name"),
        ("hydra.run.dir=null", "hydra.run.dir must be a string; got None"),
        ("hydra.run.dir=[a,b]", r"hydra.run.dir must be a string; got \['a', 'b'\]"),
        ("hydra.sweep.dir={a:1}", "hydra.sweep.dir must be a string"),
        ("resume=[a]", "resume must be a string"),
        (f"hydra.run.dir={LONG}", "at most 255 bytes; hydra.run.dir has one of 300, 'nnn"),
        (f"hydra.sweep.subdir=a/{LONG}", "at most 255 bytes; hydra.sweep.subdir has one of 300"),
        (f"resume=a/{LONG}/b", "at most 255 bytes; resume has one of 300"),
        ("hydra.run.dir=" + 128 * "λ", "hydra.run.dir has one of 256"),
    ],
)
def test_a_value_that_cannot_be_a_directory_is_refused(argument, expected):
    with pytest.raises(ConfigError, match=expected):
        require_directories(overrides_of(with_literal_paths([argument])))


@pytest.mark.parametrize(
    "argument",
    [
        "hydra.run.dir=5",
        "hydra.run.dir=a/5",
        "resume=null",
        "~hydra.run.dir=null",
        "resume=1e3",
        "hydra.run.dir=true",
        "hydra.sweep.subdir=${config_id:}",
        "hydra.run.dir=" + 255 * "n",
    ],
)
def test_a_value_that_can_be_a_directory_is_accepted(argument):
    (override,) = overrides_of(with_literal_paths([argument]))
    assert override.key_or_group == argument.lstrip("~").partition("=")[0]
    require_directories([override])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("activation=geluu", "got 'geluu'. Did you mean activation=gelu?"),
        ("optimizer=adamww", "optimizer must be one of adafactor, "),
        ("model=gpt_tinyy", "Did you mean model=gpt_tiny?"),
        ("activation=xyz", "got 'xyz'."),
        ("data=/my/a.txt", "got '/my/a.txt'. Your own text: data=text_files data.corpus.paths=/my"),
        ("data=texts/a.txt", "text_files; got 'texts/a.txt'. Your own text: data=text_files data."),
        ("data=a.txt", "got 'a.txt'. Your own text: data=text_files data.corpus.paths=a.txt."),
        ("data=text_file", "Did you mean data=text_files?"),
        (
            "hello",
            "An argument must be key=value, or an option that starts with dashes; got 'hello'.",
        ),
        ("normfree", "Did you mean --config-name=normfree?"),
        ("nromfree", "Did you mean --config-name=normfree?"),
        ("optimizer.lr", "Did you mean optimizer.lr=…?"),
        (
            "activation=gelu,relu",
            "got activation=gelu,relu. To run every combination, use nerve-run -m …; for a list, "
            'write "activation=[gelu,relu]".',
        ),
        ("callbacks=[a]", "callbacks is a group of values; got callbacks=[a]."),
        ("model.n_layers=[1", "Hydra must be able to parse each override: "),
        ("seed=choice()", "empty choice is not legal"),
        ("hydra.run=null", "field 'hydra.run' is not Optional (hydra.run)"),
        ("callbacks.a=1", "There is no value 'callbacks.a'."),
        ("threads.a=1", "There is no value 'threads.a'."),
    ],
)
def test_an_override_that_cannot_be_composed_is_explained(argument, expected):
    with pytest.raises((HydraException, OmegaConfBaseException)) as caught, hydra_at_conf():
        compose("config", [argument])
    told = explain_error(caught.value)
    assert expected in told
    assert "https://" not in told
    assert "full_key" not in told


NOTHING_TO_RUN = [
    ["--resolve"],
    ["trainer.devices=0"],
    ["trainer.devices=0", "hydra.run.dir=deep/er"],
    ["-m", "seed=range(0,0)"],
    ["-m", "seed=range(3,1)", "activation=gelu,relu"],
    ["-m", "seed=-1,-2"],
    ["-m", "hydra.sweeper.n_jobs=0"],
    [f"hydra.run.dir=a/{LONG}/b"],
    [f"--config-name={LONG}"],
    [f"{LONG}=3"],
    ["hydra=null"],
    ["--config-name="],
    ["-m", "hydra.launcher=null"],
    ["-m", "seed=interval(0,1)"],
    ["-m", "seed=range(0,1e12)"],
    ["-m", "~trainer.devices"],
    ["-m", "~trainer.devices", "hydra/launcher=slurm"],
    ["-m", "~trainer", "hydra/launcher=slurm"],
    ["-m", "hydra.sweeper.max_batch_size=-3"],
    ["-m", "hydra.sweeper.timeout_min=soon"],
    ["-m", "hydra.sweeper.params=[a]"],
]


@pytest.mark.parametrize("arguments", NOTHING_TO_RUN, ids=lambda a: " ".join(a)[:40])
def test_a_refused_command_leaves_no_directory(run, tmp_path, arguments):
    """Nor its parents; an existing one is kept."""
    (tmp_path / "own").mkdir()
    status, _, err = run(*arguments)
    assert status == 1
    assert err.startswith("nerve-run: ")
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_another_sweeper_does_not_train_on_check(run):
    """Only that of nerve shows trials instead of running them."""
    status, out, err = run("-m", "hydra/sweeper=basic", "seed=0", "check=true", "logger=none")
    assert status == 1
    assert "check=true needs hydra/sweeper=trials" in err
    assert "data:" not in out


def test_a_deleted_working_directory_is_named(run, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    status, _, err = run("seed=0")
    os.chdir(tmp_path)
    assert status == 1
    assert err == (
        "nerve-run: A command needs a working directory; this one was deleted. Change to another "
        "one.\n"
    )


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"name: [", "bad.yaml"), (b"\xff\xfe", "can't decode byte 0xff")],
)
def test_a_file_of_the_user_that_is_not_yaml_is_one_message(run, tmp_path, content, named):
    (tmp_path / "own" / "activation").mkdir(parents=True)
    (tmp_path / "own" / "activation" / "bad.yaml").write_bytes(content)
    status, _, err = run("--config-dir=own", "activation=bad")
    assert status == 1
    assert err.startswith("nerve-run: A configuration file must be YAML in UTF-8; one of yours is")
    assert named in err


def test_internals_that_another_hydra_lacks_are_named(monkeypatch):
    monkeypatch.delattr(config_loader_impl, "get_overrides_dirname")
    spec = find_spec("nerve.cli.config.hydra_internals")
    with pytest.raises(NerveError, match=r"hydra-core>=1\.3\.2,<1\.4, got .*get_overrides_dirname"):
        spec.loader.exec_module(module_from_spec(spec))


def test_an_error_of_an_import_is_one_message(monkeypatch, capsys):
    def fail(name: str) -> None:
        raise NerveError(f"{name} needs another Hydra.")

    monkeypatch.setattr(entry, "import_module", fail)
    with pytest.raises(SystemExit) as exit_:
        entry.status()
    expected = "nerve-status: nerve.cli.status needs another Hydra.\n"
    assert (exit_.value.code, capsys.readouterr().err) == (1, expected)


def test_an_existing_empty_directory_is_kept(run, tmp_path):
    (tmp_path / "own" / "mine").mkdir(parents=True)
    assert run("trainer.devices=0", "hydra.run.dir=own/mine")[0] == 1
    assert (tmp_path / "own" / "mine").is_dir()


INTERRUPTED = """
import os, signal, sys
class Stop:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop())
sys.argv = {arguments!r}
{enter}
"""
ENTERED = {
    "the command": "from nerve.cli import entry; entry.{command}()",
    "python -m": "import runpy; runpy.run_module('nerve.cli.{command}', run_name='__main__')",
}


@pytest.mark.parametrize(
    ("command", "module", "arguments", "enter"),
    [
        ("run", "hydra", [], "the command"),
        ("run", "hydra", [], "python -m"),
        ("run", "torch", ["model=gpt_tiny"], "the command"),
        ("trial", "hydra", [], "the command"),
        ("status", "nerve.cli.text_table", ["outputs"], "the command"),
        ("status", "nerve.cli.text_table", ["outputs"], "python -m"),
        ("report", "pandas", ["outputs"], "the command"),
        ("report", "nerve.progress", ["outputs"], "python -m"),
        ("probe", "nerve.progress", ["outputs"], "python -m"),
    ],
)
def test_ctrl_c_in_the_first_seconds_ends_without_a_traceback(
    tmp_path, command, module, arguments, enter
):
    code = INTERRUPTED.format(
        module=module,
        arguments=[f"nerve-{command}", *arguments],
        enter=ENTERED[enter].format(command=command),
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    name = "run" if command == "trial" else command
    assert (done.returncode, done.stderr) == (130, f"nerve-{name}: stopped\n")
