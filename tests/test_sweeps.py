"""The sweeps: the commands in their headers, and every trial of each at both scales.

Each command in a header is composed like on the command line, trial by trial, and each trial is
built and trained for two steps.
"""

import itertools
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from support import hydra_at_conf
from torch.nn import functional as F

import nerve
from nerve.cli.config.compose import CONF, SWEEPS, build, identity
from nerve.cli.run import main
from nerve.cli.sweep.grid import StoredRuns, Trial, compose_grid
from nerve.config import from_mapping
from nerve.measuring.find import find_ffns
from nerve.models import build_model
from nerve.optim import Part, Schedule, build_optimizer
from nerve.storage.state import RunState

NAMES = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
SCALES = ("cpu", "gpu")
RUNS = SWEEPS.parent / "study/runs"
QUESTIONS = {
    *("activation", "normfree", "ffn_constraint", "norm_placement", "ffn_width", "position"),
    *("gated", "optimizer", "mixer_activation", "mixer_optimizer", "llama_scale"),
    *("paper_placement", "paper_residual", "paper_normfree", "paper_activation", "paper_width"),
    *("paper_position", "paper_optimizer"),
    *("cause_pre_scale", "cause_dose", "cause_regularizer"),
}
TOKENS_A_STEP = {"llama_scale": 2**16, "paper_normfree": 2**15} | {
    f"paper_{name}": 2**16
    for name in ("placement", "residual", "activation", "width", "position", "optimizer")
}
"""At scale=gpu, where it is not the 2¹⁴ of the runs of d_model 512."""

DESIGN = ("model", "normalization", "activation", "position", "ffn", "optimizer")
"""The groups from which a network and its optimizer are built."""

every_sweep = pytest.mark.parametrize("name", NAMES)
every_scale = pytest.mark.parametrize("scale", SCALES)


@dataclass(frozen=True)
class Sweep:
    """One command of a header, composed as `nerve-run` does it.

    Attributes:
        base: what Hydra starts the sweep with: what the command line is read against, without the
            axes, and Hydra's own node.
        found: a trial of each choice of options, as it is found in the folder of the study.
        trials: the configurations of all trials of the first seed.
        seeds: the values of that axis.
    """

    base: DictConfig
    found: tuple[Trial, ...]
    trials: tuple[DictConfig, ...]
    seeds: tuple[int, ...]

    @property
    def hydra(self) -> DictConfig:
        return self.base.hydra

    @property
    def n_runs(self) -> int:
        return len(self.trials) * len(self.seeds)

    @cached_property
    def values(self) -> tuple[dict[str, Any], ...]:
        """The plain values of each trial."""
        return tuple(map(values_of, self.trials))


def header(name: str) -> list[str]:
    """The comment at the start of the file, line by line, without `#`."""
    lines = (SWEEPS / f"{name}.yaml").read_text().splitlines()
    return [line[1:].strip() for line in itertools.takewhile(lambda x: x.startswith("#"), lines)]


def commands(name: str) -> list[list[str]]:
    """The arguments of the commands in the header: that for the CPU, that for the GPU."""
    calls = [re.sub(r"^Run:\s*", "", line) for line in header(name)]
    return [shlex.split(call)[1:] for call in calls if call.startswith("nerve-run ")]


def folder(name: str, scale: str) -> Path:
    """The folder of the study with the runs of a command."""
    return RUNS / (f"{name}_gpu" if scale == "gpu" else name)


@cache
def composed(name: str, scale: str) -> Sweep:
    config_name, *overrides = commands(name)[SCALES.index(scale)]
    assert config_name == f"--config-name={name}"
    with hydra_at_conf():
        loader = GlobalHydra.instance().config_loader()
        base = loader.load_configuration(name, overrides, run_mode=RunMode.MULTIRUN)
        axes = grid(base.hydra.sweeper.params)
        seeds = axes.pop("seed", ["seed=0"])
        points = list(itertools.product(*axes.values(), seeds[:1]))
        groups = set(loader.list_groups(""))
        chosen = {point: options_of(point, groups) for point in points}
        first = {options: point for point, options in reversed(chosen.items())}
        there = [f"hydra.sweep.dir={folder(name, scale)}", "hydra.runtime.output_dir=."]
        found = compose_grid(loader, base, [[*each, *overrides, *there] for each in first.values()])
    of_options = dict(zip(first, (trial.run_config() for trial in found), strict=True))
    return Sweep(
        base,
        tuple(found),
        tuple(
            with_values(of_options[options], [each for each in point if each not in options])
            for point, options in chosen.items()
        ),
        tuple(int(seed.partition("=")[2]) for seed in seeds),
    )


def options_of(point: Sequence[str], groups: Container[str]) -> tuple[str, ...]:
    """The overrides of a trial that choose an option of a group. Composing takes a tenth of a
    second, so trials that differ only in values are composed once."""
    return tuple(each for each in point if each.partition("=")[0] in groups)


def with_values(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """A copy with these overrides of values; a key that does not exist is an error."""
    changed = deepcopy(config)
    with read_write(changed):
        for each in OverridesParser.create().parse_overrides(list(overrides)):
            OmegaConf.update(changed, each.key_or_group, each.value())
    return changed


def grid(params: Mapping[str, str]) -> dict[str, list[str]]:
    """Each axis of `hydra.sweeper.params` as a list of overrides."""
    given = [f"{key}={values}" for key, values in params.items()]
    axes = zip(params, OverridesParser.create().parse_overrides(given), strict=True)
    return {
        key: [f"{key}={value}" for value in axis.sweep_string_iterator()]
        if axis.is_sweep_override()
        else [f"{key}={axis.get_value_element_as_str()}"]
        for key, axis in axes
    }


def values_of(trial: DictConfig) -> dict[str, Any]:
    """Plain values, without the logger, whose paths only a running job knows."""
    nodes = {str(key): trial[key] for key in trial if key != "logger"}
    return {
        key: OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        for key, node in nodes.items()
    }


def data_dims_of(values: Mapping[str, Any], *, vocab_size: int, image_size: int) -> dict[str, int]:
    if values["model"]["kind"] == "gpt":
        return {"vocab_size": vocab_size}
    return {"image_size": image_size, "n_channels": 1, "n_classes": 10}


def on_meta(values: Mapping[str, Any]) -> torch.nn.Module:
    """The network at its full size, without its weights."""
    data_dims = data_dims_of(
        values, vocab_size=values["data"].get("vocab_size"), image_size=8 * patch_size(values)
    )
    with torch.device("meta"):
        return build_model(values, seed=0, **data_dims)


def patch_size(values: Mapping[str, Any]) -> int:
    return int(values["model"].get("patch_size", 1))


def optimizer_of(trial: DictConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    parts = build(trial.optimizer.parts, key="optimizer.parts")
    return build_optimizer(
        model, {str(name): Part(tuple(part.roles), part.build) for name, part in parts.items()}
    )


def shrunk(values: Mapping[str, Any], scale: str) -> dict[str, Any]:
    """The design at sizes for two steps on a CPU; designs for a CPU keep their width."""
    small = deepcopy(dict(values))
    if small["model"]["kind"] == "gpt":
        small["model"]["seq_len"] = 8
    if scale == "gpu":
        small["model"] |= {"n_layers": 4, "d_model": 48}
        if small["model"]["kind"] == "gpt":
            small["model"]["n_heads"] = 4
        if small["ffn"]["d_ff"] is not None:
            small["ffn"]["d_ff"] = 128
    return small


@cache
def train_two_steps(design: str) -> None:
    """Trains a design, as JSON, on noise; each parameter with a gradient must change and stay
    finite. Sweeps have designs in common."""
    values = json.loads(design)
    size = 2 * patch_size(values)
    model = build_model(values, seed=0, **data_dims_of(values, vocab_size=32, image_size=size))
    optimizer = optimizer_of(OmegaConf.create(values), model)
    schedule = from_mapping(Schedule, values["optimizer"]["schedule"], "optimizer.schedule")
    scheduler = schedule.scheduler(optimizer, 2)
    noise = torch.Generator().manual_seed(0)
    if values["model"]["kind"] == "gpt":
        inputs = torch.randint(32, (2, 8), generator=noise)
    else:
        inputs = torch.randn((4, 1, size, size), generator=noise)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    moved_by_gradient = set()
    for _ in range(2):
        logits = model(inputs)
        targets = torch.zeros(logits.shape[:-1], dtype=torch.long)
        F.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
        for name, tensor in model.named_parameters():
            if tensor.grad is not None and tensor.grad.any():
                moved_by_gradient.add(name)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    assert moved_by_gradient
    assert all(tensor.isfinite().all() for tensor in after.values())
    still = {name for name in moved_by_gradient if torch.equal(before[name], after[name])}
    assert not still, f"{still} got gradients and did not move"


def test_there_is_one_sweep_a_question():
    assert set(NAMES) == QUESTIONS


@every_sweep
def test_a_header_says_claim_commands_cost_and_what_to_expect(name):
    lines = header(name)
    text = "\n".join(lines)
    assert lines[0].endswith("?"), "the first line is the question"
    assert re.search(r"^Claims? (\d+|of our own)", text, re.MULTILINE)
    for part in ("Run:", "Cost:", "Expect:"):
        assert re.search(rf"^{part}\s+\S", text, re.MULTILINE), part
    on_cpu, on_gpu = commands(name)
    assert on_cpu == [f"--config-name={name}"]
    assert on_gpu[:2] == [f"--config-name={name}", "scale=gpu"]


@every_sweep
def test_the_cost_counts_the_runs_and_the_steps(name):
    counted = re.findall(r"(\d+) runs of ([\d,]+) steps", " ".join(header(name)))
    assert len(counted) == len(SCALES)
    for scale, (n_runs, n_steps) in zip(SCALES, counted, strict=True):
        sweep = composed(name, scale)
        assert sweep.n_runs == int(n_runs)
        assert {trial.trainer.max_steps for trial in sweep.trials} == {
            int(n_steps.replace(",", ""))
        }


@every_sweep
@every_scale
def test_a_sweep_is_a_multirun_with_a_directory_of_its_own(name, scale):
    hydra = composed(name, scale).hydra
    assert hydra.mode.name == "MULTIRUN"
    assert hydra.sweep.dir == f"outputs/{name}" + ("_gpu" if scale == "gpu" else "")


@every_sweep
def test_no_two_trials_of_both_scales_define_the_same_result(name):
    sweeps = [composed(name, scale) for scale in SCALES]
    ids = {identity(trial) for sweep in sweeps for trial in sweep.trials}
    assert len(ids) == sum(len(sweep.trials) for sweep in sweeps)
    for sweep in sweeps:
        assert len(set(sweep.seeds)) == len(sweep.seeds)


@every_sweep
@every_scale
def test_every_trial_builds_at_its_full_size_and_is_measured_on_the_same_tokens(name, scale):
    n_tokens, widths = set(), set()
    sweep = composed(name, scale)
    for trial, values in zip(sweep.trials, sweep.values, strict=True):
        model = on_meta(values)
        optimizer_of(trial, model)
        widths |= {ffn.post.in_features for ffn in find_ffns(model)}
        n_tokens.add(trial.monitor.n_tokens)
        if scale == "gpu":
            is_of_the_study = trial.model.kind == "gpt" and "llama" not in name
            least = 20e6 if is_of_the_study else 50e6
            assert sum(parameter.numel() for parameter in model.parameters()) > least
            assert trial.model.n_layers >= 12
    if trial.model.kind == "gpt" and len(widths) > 1:
        assert len(n_tokens) == 1
        assert n_tokens.pop() >= 8 * max(widths)


@every_sweep
@every_scale
def test_every_trial_takes_two_training_steps(name, scale):
    sweep = composed(name, scale)
    for values in sweep.values:
        small = shrunk(values, scale)
        train_two_steps(json.dumps({name: small[name] for name in DESIGN}, sort_keys=True))


@every_sweep
def test_one_value_of_an_axis_can_be_asked_for(name):
    """`nerve-run --config-name=cause_dose activation.alpha=0.5` is parsed against the sweep without
    its axes, which must have that key."""
    sweep = composed(name, "cpu")
    keys = [key for key in sweep.hydra.sweeper.params if not (CONF / key).is_dir()]
    keys = [key for key in keys if not (SWEEPS / key).is_dir()]
    for key in keys:
        parent, _, leaf = key.rpartition(".")
        assert leaf in (OmegaConf.select(sweep.base, parent) if parent else sweep.base), key


@every_sweep
def test_the_gpu_scale_changes_sizes_and_keeps_the_question(name):
    on_cpu, on_gpu = (composed(name, scale) for scale in SCALES)
    assert list(on_cpu.hydra.sweeper.params) == list(on_gpu.hydra.sweeper.params)
    if name == "optimizer":  # without the two that are too slow there
        names = [[trial.optimizer.name for trial in sweep.trials] for sweep in (on_cpu, on_gpu)]
        assert names[1] == [each for each in names[0] if each not in ("soap", "shampoo")]
    else:
        assert len(on_cpu.trials) == len(on_gpu.trials)
    for trial in on_cpu.trials:
        assert (trial.trainer.accelerator, trial.compile) == ("cpu", False)
    for trial in on_gpu.trials:
        assert (trial.trainer.accelerator, trial.compile) == ("gpu", True)
        if trial.model.kind == "gpt":
            n_sequences = trial.data.batch_size * trial.trainer.accumulate_grad_batches
            assert n_sequences * trial.model.seq_len == TOKENS_A_STEP.get(name, 2**14)


def test_the_data_of_every_sweep_can_be_opened():
    sweeps = [composed(name, scale) for name in NAMES for scale in SCALES]
    nodes = {OmegaConf.to_yaml(sweep.trials[0].data): sweep.trials[0] for sweep in sweeps}
    for trial in nodes.values():
        sizes = {"n_train_batches": 1, "seed": 0}
        if trial.model.kind == "gpt":
            sizes["n_heldout_tokens"] = 1
        build(trial.data, key="data", **sizes)


def test_a_trial_without_the_archive_that_it_needs_names_the_key():
    with hydra_at_conf():
        trial = compose("mixer_optimizer", ["scale=gpu"])
    assert OmegaConf.missing_keys(trial.data) == {"data.images.path"}


@every_scale
def test_each_optimizer_has_a_learning_rate_of_its_own(scale):
    rates = {
        trial.optimizer.name: trial.optimizer.lr for trial in composed("optimizer", scale).trials
    }
    assert len(rates) >= 5
    assert len(set(rates.values())) > 2


@pytest.mark.parametrize(
    ("name", "searched"),
    [("optimizer", "optimizer_gpu"), ("paper_optimizer", "paper_optimizer_probes_gpu")],
)
def test_the_gpu_scale_takes_the_rates_that_were_the_best_of_those_searched(name, searched):
    losses: dict[str, dict[float, float]] = {}
    for path in (RUNS / searched).glob("*/run.json"):
        run = json.loads(path.read_text())
        if run["seed"] == 0:
            of_rates = losses.setdefault(run["config"]["optimizer"]["name"], {})
            of_rates[run["config"]["optimizer"]["lr"]] = run["final"]["val_loss"]
    rates = {trial.optimizer.name: trial.optimizer.lr for trial in composed(name, "gpu").trials}
    assert set(losses) == set(rates)
    for optimizer, of_rates in losses.items():
        assert len(of_rates) >= 3
        assert rates[optimizer] == min(of_rates, key=of_rates.__getitem__)


STATES = {
    "normfree": {RunState.DONE: 3, RunState.NEW: 15},  # they say more than those of scale=gpu
    "normfree_gpu": {RunState.DONE: 17, RunState.FAILED: 1},  # the loss of one became infinite
    "cause_pre_scale": {RunState.DONE: 23, RunState.FAILED: 1},  # norm-free with SD(u) = 1
    "cause_pre_scale_gpu": {RunState.DONE: 18, RunState.FAILED: 6},  # norm-free with .4 and 1
}
"""Of the folders that do not hold every trial of their command, done."""


@pytest.mark.parametrize("place", sorted(path.name for path in RUNS.iterdir()))
def test_the_commands_in_the_headers_find_the_runs_of_the_study_done(place, monkeypatch, capsys):
    """By their configurations, whatever their directories are called: with a copy of the runs,
    nothing remains to be run."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    name = place.removesuffix("_gpu")
    if name not in NAMES:
        told = place in ("normfree_rates_gpu", "residual")
        asked = place.startswith(("glyphs_", "digits_reversed_", "optimizer_rates", "paper_"))
        assert told or asked, "the commands are in study/findings.md or study/queue.md"
        return
    sweep = composed(name, "gpu" if place.endswith("_gpu") else "cpu")
    assert [trial.rejected_because for trial in sweep.found] == [None] * len(sweep.found)
    assert all(trial.is_to_do == (trial.state_before == RunState.NEW) for trial in sweep.found)
    stored = StoredRuns()
    runs = []
    for trial in map(deepcopy, sweep.trials):
        for seed in sweep.seeds:
            with read_write(trial):
                trial.seed = seed
            config_id = identity(trial)
            runs.append(stored.run_of(stored.at(RUNS / place / config_id), config_id))
    assert {trial.directory for trial in sweep.found} <= {run.path for run in runs}
    found = Counter(run.state for run in runs)
    assert found == STATES.get(place, {RunState.DONE: sweep.n_runs})
    places = {run.path for run in runs if run.state != RunState.NEW}
    assert len(places) == sweep.n_runs - found[RunState.NEW], "each trial has a run of its own"
    assert capsys.readouterr().out == "", "no two runs of one configuration, none unreadable"


def test_the_command_runs_a_sweep_that_the_command_line_narrows(monkeypatch, tmp_path, capsys):
    """Its trials are processes with simulated training."""
    stand_in = Path(__file__).parent / "cli" / "sweep" / "stand_in.py"
    monkeypatch.setattr("nerve.cli.sweep.local.COMMAND", [sys.executable, "-P", str(stand_in)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    Path("deeds.json").write_text("{}")
    narrowed = ["activation=gelu,identity", "seed=3"]
    monkeypatch.setattr(sys, "argv", ["nerve-run", "--config-name=activation", *narrowed])
    main()
    runs = nerve.load_runs(tmp_path / "outputs" / "activation")
    assert set(runs["activation.name"]) == {"gelu", "identity"}
    assert set(runs.seed) == {3}
    assert set(runs.sweep) == {"activation"}
    assert [Path(directory).name for directory in runs.directory] == runs.config_id.tolist()
    assert "HYDRA" not in capsys.readouterr().err
