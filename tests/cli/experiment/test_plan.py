"""What a run returns to a sweeper, whether it trains now or was done before."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from support import TINY_RUN

import nerve
from nerve.cli.experiment import run as experiment
from nerve.cli.experiment.plan import SCORES, check_objective, ffns_of
from nerve.cli.experiment.summary import objective_of
from nerve.errors import ConfigError
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore

TINY = [*TINY_RUN, "trainer.max_steps=3", "hydra.run.dir=it"]


@pytest.fixture
def returned(monkeypatch) -> list[float]:
    """What the task has returned to Hydra, one entry per call."""
    values: list[float] = []
    task: Callable[..., float] = experiment.run_experiment

    def noting(*args) -> float:
        values.append(task(*args))
        return values[-1]

    monkeypatch.setattr(experiment, "run_experiment", noting)
    return values


def test_a_run_returns_its_objective_also_when_it_is_already_done(run, returned, monkeypatch):
    """The loss by default; another objective does not make it another run."""
    assert run(*TINY)[0] == 0
    final = RunRecord.load("it").final
    last = nerve.load_metrics("it").query("step == 3")
    assert returned.pop() == final["val_loss"] == last.val_loss.iloc[0]
    monkeypatch.setattr(experiment, "build_data", lambda *args: pytest.fail("it trains again"))
    for name, value in {
        "val_loss": final["val_loss"],
        "bits_per_byte": final["bits_per_byte"],
        "pr_post": last.pr_post.mean(),
        "ffn/mean/js": last.js.mean(),
    }.items():
        status, _, err = run(*TINY, f"objective={name}")
        assert (status, err) == (0, "")
        assert returned.pop() == pytest.approx(value, rel=1e-15)


def test_a_trial_of_another_sweeper_returns_its_objective(run, returned):
    """To a sweeper that uses it; the id of the trial does not depend on the objective."""
    several = ["-m", "hydra/sweeper=basic", *TINY[:-1], "seed=0,1"]
    status, _, err = run(*several, "objective=se_pre")
    assert (status, err) == (0, "")
    metrics = nerve.load_metrics("outputs/multirun", factors=["seed"]).query("step == 3")
    means = metrics.groupby("seed").se_pre.mean()
    assert returned == pytest.approx([means[0], means[1]], rel=1e-15)
    assert run(*several)[0] == 0
    assert len(returned) == 4
    assert len(nerve.load_runs("outputs/multirun")) == 2


@pytest.mark.parametrize("name", ["prpost", "val_accuracy", "null", "token_mixing/mean/js"])
def test_an_objective_that_the_run_will_not_have_is_refused_before_it_starts(run, returned, name):
    status, _, err = run(*TINY, f"objective={name}")
    assert status == 1
    assert "objective must be one of val_loss, bits_per_byte, se_pre" in err
    assert "ffn/mean/js" in err
    if name == "prpost":
        assert "Did you mean 'pr_post'?" in err
    assert not Path("it", "run.json").exists()


def test_every_accepted_objective_has_a_number_at_the_end(run, returned):
    """Every name that is accepted has a number in the end."""
    mixer = ["model=mixer_tiny", "model.n_layers=2", "model.d_model=16", "data.batch_size=8"]
    small = ["trainer.max_steps=1", "trainer.enable_progress_bar=false", "threads=1"]
    assert run(*mixer, *small, "objective=val_accuracy", "hydra.run.dir=mixer")[0] == 0
    assert run(*TINY)[0] == 0
    assert returned[0] == RunRecord.load("mixer").final["val_accuracy"]
    for kind, directory in (("gpt", "it"), ("mixer", "mixer")):
        last = nerve.load_metrics(directory).query("step == step.max()")
        assert set(ffns_of(kind)) == set(last.ffn)
        for name in (*SCORES[kind], "js", *(f"{ffn}/mean/pr_post" for ffn in ffns_of(kind))):
            check_objective(name, kind)
            assert math.isfinite(objective_of(RunDirectory(directory), name))
        by_ffn = last.groupby("ffn").pr_post.mean()
        for ffn, mean in by_ffn.items():
            name = f"{ffn}/mean/pr_post"
            assert objective_of(RunDirectory(directory), name) == pytest.approx(mean, rel=1e-15)
        with pytest.raises(ConfigError, match="objective must be one of val_loss"):
            check_objective("perplexity", kind)


def test_a_metric_of_dead_layers_is_nan(tmp_path):
    RunRecord.create(tmp_path, {}, run_id="it").finish("done", final={"val_loss": 1.0})
    store = RunStore(tmp_path, "it")
    sizes = {"tokens_seen": 0, "n_samples": 9, "d_ff": 4, "d_in": 4, "ffn": "ffn", "layer": 0}
    rows = [{"step": step, "status": "ok", "js": js} for step, js in ((0, 0.5), (2, None))]
    store.append_metrics(sizes | row for row in rows)
    store.flush(2)
    assert math.isnan(objective_of(RunDirectory(tmp_path), "js"))
