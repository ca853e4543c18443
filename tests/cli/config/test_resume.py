"""`resume=<run directory>` uses the configuration of the run, and refuses other values."""

import pytest

from nerve.cli.config.compose import identity
from nerve.cli.config.resume import prepare_resume
from nerve.errors import StoreError


@pytest.fixture
def begun(run, experiments) -> str:
    """The directory of a run with options and values that differ from the defaults."""
    assert run("hydra.run.dir=it", "optimizer=muon", "ffn=gated", "seed=3", "threads=1")[0] == 0
    return "it"


def test_the_saved_configuration_is_run_in_the_same_directory(run, begun, experiments):
    status, _, err = run(f"resume={begun}")
    assert (status, err) == (0, "")
    (first, where), (second, there) = experiments
    assert where == there
    assert identity(first) == identity(second)
    assert (second.optimizer.name, second.seed, second.threads) == ("muon", 3, 1)


@pytest.mark.parametrize("data", ["digits", "python_source", "text_files"])
def test_data_that_do_not_take_an_added_key_do_not_get_it(run, experiments, data):
    kind = ["model=mixer_tiny"] if data == "digits" else []
    given = ["data.corpus.paths=x.txt"] if data == "text_files" else []
    assert run("hydra.run.dir=it", f"data={data}", *kind, *given)[0] == 0
    assert run("resume=it")[0] == 0
    (first, _), (second, _) = experiments
    assert second.data == first.data


@pytest.mark.parametrize("same", ["it", "./it/", "'it'"])
def test_its_own_directory_may_be_given(run, begun, experiments, same):
    assert run(f"resume={begun}", f"hydra.run.dir={same}")[::2] == (0, "")
    (_, where), (_, there) = experiments
    assert where.resolve() == there.resolve()


def test_values_that_do_not_define_the_result_may_be_given(run, begun, experiments):
    free = ["threads=2", "logger=none", "retry=true", "checkpoint.every_n_steps=7"]
    status, _, err = run(f"resume={begun}", *free, "hydra.verbose=false")
    assert (status, err) == (0, "")
    (first, where), (second, there) = experiments
    assert (where, identity(first)) == (there, identity(second))
    assert (second.threads, second.logger, second.retry) == (2, {}, True)
    assert second.checkpoint.every_n_steps == 7


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        (["seed=4"], "got seed=4 with resume=it"),
        (["activation=relu", "++model.n_layers=2"], "activation=relu ++model.n_layers=2"),
        (["-m"], "with --multirun"),
        (["--config-name=normfree"], "--config-name"),
        (["--config-n=config"], "--config-name"),
        (["hydra.run.dir=other"], "resumed in its own directory; got hydra.run.dir=other"),
        (["--multi"], "with --multirun"),
    ],
)
def test_values_that_would_make_it_another_run_are_refused(run, begun, experiments, beside, named):
    status, _, err = run(f"resume={begun}", *beside)
    assert status == 1
    assert named in err
    assert len(experiments) == 1


def test_a_directory_that_is_not_a_run_is_refused(run, experiments):
    status, _, err = run("resume=nowhere")
    assert status == 1
    assert "nowhere does not" in err
    assert not experiments


def test_resume_null_is_an_ordinary_run(run, experiments):
    assert run("resume=null")[0] == 0
    assert experiments[0][1].parent.name == "outputs"


@pytest.mark.parametrize(
    "content", [b"[a: b: c", b"- 1\n- 2\n", b"5", b"\xff\xfe\x00", b"\x00" * 50, b"", b"a: ${"]
)
def test_a_damaged_configuration_is_named(tmp_path, content):
    """Truncated, overwritten, or of another kind; before anything is composed."""
    saved = tmp_path / ".hydra" / "config.yaml"
    saved.parent.mkdir()
    saved.write_bytes(content)
    with pytest.raises(StoreError, match=r"config\.yaml is not a configuration saved by Hydra"):
        prepare_resume(tmp_path, [], [])
