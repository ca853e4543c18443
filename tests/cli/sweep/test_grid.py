"""The grid of a sweep, its trials as Hydra composes them, and where their runs are."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from support import hydra_at_conf

from nerve.cli.sweep.grid import MOST_TRIALS, Composer, combinations
from nerve.cli.sweep.stored import StoredRuns
from nerve.errors import ConfigError
from nerve.storage.identity import config_id
from nerve.storage.record import RunRecord
from nerve.storage.state import RunLock


def test_runs_are_found_by_their_configuration_and_the_best_one_is_used(tmp_path, capsys):
    """Done, then active, then the furthest, then the latest heartbeat; only directly below."""
    config = {"seed": 1}
    for name, run_status, step in (
        ("a", "interrupted", 10),
        ("b", "failed", 20),
        ("c", "running", 5),
        ("d", "done", 1),
    ):
        RunRecord.create(tmp_path / name, config).update(run_status=run_status, step=step)
    other = RunRecord.create(tmp_path / "other", {"seed": 2})
    for name in (".hidden", "a/inside"):
        RunRecord.create(tmp_path / name, config)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    lock = RunLock(tmp_path / "c")
    stored = StoredRuns()
    new = stored.at(tmp_path / "new")
    assert stored.run_of(new, config_id(config)) is stored.at(tmp_path / "d")
    assert stored.run_of(new, other.config_id) is stored.at(tmp_path / "other")
    assert stored.run_of(new, config_id({"seed": 3})) is new
    lock.release()
    broken, several = capsys.readouterr().out.splitlines()
    assert broken.startswith(f"skipped: {tmp_path / 'broken' / 'run.json'} is not the record")
    rest = ", ".join(str(tmp_path / name) for name in "cba")
    assert several == (
        f"{tmp_path / 'd'} (done, step 1) is used; ignored, with the same configuration: {rest}"
    )


def test_a_missing_folder_holds_no_run(tmp_path):
    stored = StoredRuns()
    own = stored.at(tmp_path / "nowhere" / "0123456789ab")
    assert stored.run_of(own, "0123456789ab") is own


@pytest.mark.parametrize("run_status", ["done", "running"])
def test_a_completed_or_active_run_named_by_its_id_is_used(tmp_path, capsys, run_status):
    """Its siblings are not even read: the broken record is not reported."""
    RunRecord.create(tmp_path / "beside", {"seed": 1}).finish("done", step=9)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    record = RunRecord.create(tmp_path / "own", {"seed": 1})
    record.update(run_status=run_status)
    lock = RunLock(tmp_path / "own")
    stored = StoredRuns()
    own = stored.at(tmp_path / "own")
    assert stored.run_of(own, record.config_id) is own
    assert capsys.readouterr().out == ""
    lock.release()


TRIALS = [
    ["activation=gelu", "seed=0"],
    ["seed=1", "activation=gelu", "optimizer.lr=0.1"],
    ["optimizer={lr: 0.5}", "optimizer.lr=0.2"],
    ["optimizer.lr=0.2", "optimizer={lr: 0.5}"],
    ["model=llama_71m", "model.n_layers=3", 'ffn.width="8/3"'],
    ["+callbacks.a._target_=a.B", "+callbacks.a.n=3"],
    ["++trainer.x=1", "~data.corpus", "~seed"],
    ["~trainer"],
    ["logger=none", "trainer=ddp", "monitor.layers=[0,1]"],
    ["callbacks=null"],
    ["seed='1,2'", "objective=${seed}"],
    ["hydra.job.chdir=true", "hydra.sweep.subdir=${seed}", "seed=4"],
    ["data=digits", "model=mixer_tiny"],
    ["+optimizer@second=sgd"],
    ["~activation"],
    ["seed=1,2"],
    ["optimizr=adamw"],
    ["model.nope=1"],
    ["activation=nope"],
    ["seed@x=1"],
    ["~data.nope"],
]


def told(compose: Callable[[], DictConfig]) -> list[Any]:
    """The contents, types and flags of a configuration, or why there is none."""
    try:
        config = compose()
    except HydraException as error:
        return [type(error), str(error)]

    def nodes(node: Any) -> list[Any]:
        meta = node._metadata
        own = [(type(node), meta.flags, meta.object_type, meta.ref_type)]
        if not isinstance(node, DictConfig) or node._is_none() or node._is_interpolation():
            return own
        return own + [each for key in node for each in nodes(node._get_node(key))]

    return [OmegaConf.to_yaml(config), *nodes(config)]


def trials_of(*overrides: str) -> list[str]:
    parsed = OverridesParser.create().parse_overrides([*overrides])
    return [" ".join(each) for each in combinations(parsed)]


def test_a_grid_has_every_combination_and_its_last_axis_changes_fastest():
    assert trials_of("seed=range(2)", "x=5", "+a.b='1,2',c", "~d") == [
        f"seed={seed} x=5 +a.b={value} ~d={end}"
        for seed in (0, 1)
        for value in ("'1,2'", "c")
        for end in ["null"]
    ]
    assert trials_of() == [""]


def test_of_axes_with_one_key_the_last_counts_in_the_place_of_the_first():
    assert trials_of("seed=0,1", "x=5", "seed=2") == ["seed=2 x=5"]


def test_grids_are_as_hydras_own_sweeper_makes_them():
    for overrides in (["a=1,2", "b=x,y", "c=[1,2],[3]"], ["a=choice(1,2)", "a=3,4"], ["++a=b"]):
        parsed = OverridesParser.create().parse_overrides(overrides)
        assert [combinations(parsed)] == BasicSweeper.split_arguments(parsed, max_batch_size=None)


def test_too_many_trials_are_refused_before_they_are_counted():
    for overrides in (["a=range(0,1e15)"], ["a=range(1000)", "b=range(1000)"]):
        with pytest.raises(ConfigError, match=r"at most 100,000 trials.*a=range"):
            trials_of(*overrides)
    assert len(trials_of("a=range(100)", "b=range(1000)")) == MOST_TRIALS


def test_trials_are_composed_as_hydra_does():
    """With any shared options and any order of overrides; with the same errors."""
    with hydra_at_conf():
        loader = GlobalHydra.instance().config_loader()
        given = ["hydra.sweep.subdir=${hydra.job.num}_${seed}", "seed=1,2"]
        config = loader.load_configuration("config", given, RunMode.MULTIRUN)
        composer = Composer(loader, config)
        for overrides in TRIALS:
            expected = told(partial(loader.load_sweep_config, config, overrides))
            for _ in range(2):
                assert told(partial(composer.compose, overrides)) == expected


def test_options_are_composed_once(monkeypatch):
    with hydra_at_conf():
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("config", ["seed=1,2"], RunMode.MULTIRUN)
        composer, load, asked = Composer(loader, config), loader.load_sweep_config, []
        monkeypatch.setattr(
            loader, "load_sweep_config", lambda *args: asked.append(args[1]) or load(*args)
        )
        for activation in ("relu", "gelu"):
            for seed in range(3):
                composed = composer.compose([f"seed={seed}", f"activation={activation}"])
                assert (composed.seed, composed.activation.name) == (seed, activation)
    assert asked == [["activation=relu"], ["activation=gelu"]]
