"""A configuration that is wrong is refused by its plan alone, with one message that names keys."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from cProfile import Profile
from functools import reduce
from itertools import cycle

import pytest
import torch
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from support import composed
from torch.nn.utils.parametrize import ParametrizationList

from nerve.cli.config.compose import CONF
from nerve.cli.experiment.machine import Estimate
from nerve.cli.experiment.plan import Plan
from nerve.cli.experiment.trainer import n_devices_of
from nerve.errors import NerveError
from nerve.models import build_model
from nerve.nn.constraint import CONSTRAINTS
from nerve.optim import build_optimizer
from nerve.storage.identity import config_id

GPT = ("logger=none", "model.n_layers=2", "model.d_model=32", "model.n_heads=2", "model.seq_len=32")
MIXER = ("logger=none", "model=mixer_tiny", "model.n_layers=2", "model.d_model=24", "ffn.width=4")

MOST_CALLS = 30_000
"""Python functions that a plan may enter, made or refused: some 7 ms."""

PRESETS = [file.stem for file in (CONF / "model").glob("*.yaml")]

CALLBACKS = "lightning.pytorch.callbacks"

BAD_GPT = [
    (["+monitor.ffns=[a]"], ["a key of monitor must be one of every_n_steps", "got 'ffns'"]),
    (["optimizer=muon", "optimizer.momentum=x"], ["optimizer.momentum must be a number; got"]),
    (["+monitor.every=8"], ["a key of monitor must be one of every_n_steps", "got 'every'"]),
    (["optimizer.lr=abc"], ["optimizer.lr must be a number; got 'abc'"]),
    (["optimizer.lr=-1"], ["optimizer.lr must be at least 0; got -1"]),
    (["optimizer=muon", "optimizer.rest_lr=x"], ["optimizer.rest_lr must be a number; got 'x'"]),
    (["trainer.enable_progress_bar=maybe"], ["trainer.enable_progress_bar must be true or false"]),
    *(
        ([f"+trainer.{key}={value}"], [f"on all of the requested data; got trainer.{key}={value}."])
        for key, values in {
            "limit_val_batches": ("0", "0.0", "1", "0.5"),
            "limit_train_batches": ("0", "1", "10", "0.5"),
            "overfit_batches": ("1", "0.1"),
            "fast_dev_run": ("True", "3"),
        }.items()
        for value in values
    ),
    (["trainer.log_every_n_steps=null"], ["log_every_n_steps must be a whole number; got None"]),
    (["trainer.log_every_n_steps=-1"], ["log_every_n_steps must be at least 0; got -1"]),
    (["trainer.gradient_clip_val=-1"], ["gradient_clip_val must be null or at least 0; got -1"]),
    (["trainer.precision=7"], ["trainer cannot be built: ValueError: Precision 7 is invalid"]),
    (["+trainer.device=1"], ["a key of trainer must be one of", "Did you mean 'devices'?"]),
    (["activation.name=gelo"], ["activation.name must be one of", "Did you mean 'gelu'"]),
    (
        ["normalization=normfree", "normalization.placement=post"],
        ["normalization.kind=none", "normalization.placement=post"],
    ),
    (
        ["model.pre_std=1", "ffn.constraint=spectral_norm"],
        ["model.pre_std=1 scales", "ffn.constraint=spectral_norm"],
    ),
    (
        [
            *("monitor.shortcut=projected", "monitor.source=train"),
            *("ffn.constraint=weight_norm", "trainer.precision=bf16-mixed"),
        ],
        ["monitor.shortcut=projected reads", "ffn.constraint=weight_norm", "monitor.source=train"],
    ),
    (
        ["regularizer=participation_ratio", "regularizer.layers=[1,2]"],
        ["regularizer.layers must be null (all) or layers that have FFNs", "got [1, 2]"],
    ),
    (
        ["regularizer=participation_ratio", "regularizer.site=input"],
        ["regularizer.site must be one of pre, post; got 'input'"],
    ),
    (
        ["regularizer=participation_ratio", "regularizer.weight=a"],
        ["regularizer.weight must be a whole number or a number; got 'a'"],
    ),
    (["activation=interpolated", "activation.alpha=2"], ["activation.alpha must lie in [0, 1]"]),
    (["model.pre_std=0"], ["model.pre_std must be null or positive; got 0"]),
    (["model.n_heads=3"], ["model.d_model=32", "model.n_heads=3"]),
    (["ffn.width=0.3"], ["ffn.width=0.3", "model.d_model=32"]),
    (["ffn.d_ff=64"], ["ffn.width=4", "ffn.d_ff=64"]),
    (["trainer.accelerator=mps"], ["float64", "trainer.accelerator=mps. Use trainer=cpu"]),
    (["trainer.accelerator=gpus"], ["trainer.accelerator must be one of auto, gpu"]),
    (["~trainer.devices"], ["trainer lacks devices"]),
    (["trainer.accelerator=5"], ["trainer.accelerator must be one of auto, gpu"]),
    (["trainer.strategy=dpp"], ["trainer.strategy must be one of auto, ddp", "'ddp'?"]),
    (["trainer.strategy=ddp_spawn"], ["trainer.strategy must be one of auto, ddp, ddp_find"]),
    (["trainer.strategy=ddp_notebook"], ["trainer.strategy must be one of auto, ddp, ddp_find"]),
    (
        ["trainer.strategy={_target_:lightning.pytorch.strategies.DDPStrategy,start_method:fork}"],
        ["must be the command itself", "got trainer.strategy.start_method=fork. Leave it out."],
    ),
    *(([f"trainer.devices={n}"], ["trainer.devices must be auto"]) for n in ("-3", "0", "no")),
    *(
        (
            ["trainer=fsdp", f"optimizer={name}"],
            ["trainer.strategy=fsdp", f"optimizer.parts.{part}.build._target_="],
        )
        for name, part in {
            "soap": "matrices",
            "shampoo": "matrices",
            "muon": "matrices",
            "dion": "matrices",
            "adafactor": "main",
        }.items()
    ),
    (
        ["trainer=fsdp", "trainer.strategy=fsdp_cpu_offload", "optimizer=muon"],
        ["trainer.strategy=fsdp_cpu_offload", "_target_=nerve.optim.Muon"],
    ),
    (["threads=1000000"], ["threads must be at most 4,096", "got 1000000"]),
    (["model.n_layers=1000000000"], ["model.n_layers must be at most 100,000"]),
    (["model.d_model=1000000000", "model.n_heads=1"], ["model and ffn do not: Storage size"]),
    *(
        ([f"{key}={value}"], [f"{key} must be a finite number; got {value}"])
        for key in ("model.init_std", "model.pre_std", "optimizer.lr", "optimizer.weight_decay")
        for value in ("inf", "nan")
    ),
    *(([f"~{key}"], [f"{key} is missing. Leave ~{key} out"]) for key in ("seed", "optimizer")),
    *(([f"~{key}"], [f"{key} is missing. Leave ~{key} out"]) for key in ("monitor", "callbacks")),
    (["monitor=5"], ["monitor must be a group of values; got 5"]),
    (["checkpoint=often"], ["checkpoint must be a group of values; got 'often'"]),
    (["callbacks=null"], ["callbacks must be a group of values; got None"]),
    (["data.cache_dir=[a]"], ["data.cache_dir must be a string; got ['a']"]),
    (["data.cache_dir=5"], ["data.cache_dir must be a string; got 5"]),
    (["data.cache_dir=''"], ["data.cache_dir must name a file or a folder; got ''"]),
    (["data.tokenizer=true"], ["data.tokenizer must be a string; got True"]),
    (["data.tokenizer={a:1}"], ["data.tokenizer must be a string"]),
    ([f"data.tokenizer={300 * 'n'}"], ["at most 255 bytes; data.tokenizer has one of 300, 'nnn"]),
    ([f"data.cache_dir='a/{130 * 'λ'}/b'"], ["at most 255 bytes; data.cache_dir has one of 260"]),
    (["data.corpus.roots=5"], ["data.corpus.roots must be a string; got 5"]),
    (["data.corpus.roots=[a,[b]]"], ["data.corpus.roots[1] must be a string; got ['b']"]),
    (["data.corpus.roots=[]"], ["data.corpus.roots must have a path; got an empty list"]),
    (
        ["data=text_files", "data.corpus.paths=[5]"],
        ["data.corpus.paths[0] must be a string; got 5"],
    ),
    (
        ["data=text_files", "data.corpus.paths=null"],
        ["data.corpus.paths must be a string; got None"],
    ),
    (["data=text_files", "data.corpus.paths={a:1}"], ["data.corpus.paths must be a string"]),
    (
        [f"+callbacks.{name}._target_={CALLBACKS}.TQDMProgressBar" for name in ("a", "b")],
        ["at most one progress bar; got callbacks.a and callbacks.b"],
    ),
    (
        ["trainer.enable_progress_bar=false", f"+callbacks.a._target_={CALLBACKS}.RichProgressBar"],
        ["at most one progress bar; got callbacks.a with trainer.enable_progress_bar=false"],
    ),
    (["optimizer.parts=null"], ["optimizer.parts must be a group of values; got None"]),
    (["+callbacks.a=5"], ["callbacks.a must be a mapping with the class of a callback"]),
    (["+callbacks.a._target_=builtins.dict"], ["callbacks.a._target_", "builtins.dict gives dict"]),
    (["+callbacks.a._target_=nowhere.X"], ["callbacks.a cannot be built"]),
    (
        [f"+callbacks.a._target_={CALLBACKS}.EarlyStopping", "+callbacks.a.monitor=val_los"],
        ["callbacks.a.monitor must be one of", "Did you mean 'val_loss'?"],
    ),
    (
        [f"+callbacks.a._target_={CALLBACKS}.ModelCheckpoint", "+callbacks.a.monitor=pr_pots"],
        ["callbacks.a.monitor must be one of", "Did you mean 'pr_post'?"],
    ),
    (
        [
            f"+callbacks.a._target_={CALLBACKS}.GradientAccumulationScheduler",
            "+callbacks.a.scheduling={0:2}",
        ],
        ["callbacks.a changes it", "Set trainer.accumulate_grad_batches"],
    ),
    (["trainer.max_steps=true"], ["trainer.max_steps must be a whole number; got True"]),
    (["trainer.max_steps=0"], ["trainer.max_steps must be a whole number of at least 1; got 0"]),
    (["checkpoint.keep=[0,900]"], ["checkpoint.keep", "900 with trainer.max_steps=400"]),
    (["monitor.source=validation"], ["monitor.source must be one of heldout, train"]),
    (["monitor.every_n_steps=-1"], ["monitor.every_n_steps", "-1"]),
    (["threads=0"], ["threads must be null or a whole number of at least 1; got 0"]),
    (["compile=maybe"], ["compile must be true or false; got 'maybe'"]),
    (["check=maybe"], ["check must be true or false; got 'maybe'"]),
    (["seed=-1"], ["seed must be a whole number", "-1"]),
    (["objective=pr_pots"], ["objective must be one of", "Did you mean 'pr_post'?"]),
    (["data.batch_size=0"], ["data.batch_size must be a whole number of at least 1; got 0"]),
    (["data.batch_size=true"], ["data.batch_size must be a whole number; got True"]),
    (["data.seq_len=1.5"], ["data.seq_len must be a whole number; got 1.5"]),
    (["data.seq_len=1e400"], ["data.seq_len must be a whole number; got inf"]),
    (["data.seq_len=64"], ["model.seq_len is the longest sequence", "got 32 with data.seq_len=64"]),
    (
        ["data.corpus._target_=nerve.none"],
        ["data.corpus._target_ must name a function; got 'nerve"],
    ),
    (
        ["data=text_files", "data.corpus.paths=[a]", "+data.corpus.path=a"],
        ["a key of data.corpus must be one of paths, text_column, separator; got 'path'"],
    ),
    (["data.corpus.roots=3"], ["data.corpus.roots must be a string; got 3"]),
    (
        ["data=text_files", "data.corpus.paths=[a]", "data.corpus.text_column={a: 1}"],
        ["data.corpus.text_column must be a string; got {'a': 1}"],
    ),
    (["trainer.strategy={}"], ["trainer.strategy must be one of auto, ddp", "got {}"]),
    (
        ["trainer.accumulate_grad_batches=100000000000000000000"],
        ["at most 9,223,372,036,854,775,807 batches", "trainer.accumulate_grad_batches is 40,000"],
    ),
    (
        ["optimizer=shampoo", "optimizer.precondition_frequency=1.5"],
        ["optimizer.precondition_frequency must be a whole number of at least 1; got 1.5"],
    ),
    (
        ["optimizer.name=muon"],
        ["got muon for torch.optim.AdamW", "Choose the optimizer with optimizer=muon"],
    ),
    (["optimizer=muon", "optimizer.name=adamw"], ["got adamw for nerve.optim.Muon"]),
    (["optimizer=muon", "optimizer.momentum=1"], ["optimizer.momentum must lie in [0, 1); got 1"]),
    (["monitor.groups=[[1]]"], ["an entry of monitor.groups must be one of", "got [1]"]),
    (["model.d_model=1000000000000000000000"], ["The weights of a model must fit into memory"]),
    (["data.vocab_size=1000000000000000000000"], ["The weights of a model must fit into memory"]),
    (["optimizer.name=null"], ["optimizer.name must be a string; got None"]),
    (["optimizer.parts.main.roles=3"], ["roles of optimizer.parts must be a list; got 3"]),
    (
        ["optimizer.parts.main.build._partial_=abc"],
        ["optimizer.parts.main.build cannot be built", "_partial_ flag must be a bool"],
    ),
    (["callbacks='${seed}'"], ["callbacks must be a group of values; got 0"]),
    (
        ["monitor.layers=[0,7]"],
        ["monitor.layers must be null (all) or layers that have FFNs, which are 0, 1"],
    ),
    (["monitor.n_tokens=lots"], ["monitor.n_tokens", "lots"]),
    (["ffn.bias=no"], ["ffn.bias must be true or false; got 'no'"]),
    (["model.tie_embeddings=off"], ["model.tie_embeddings must be true or false; got 'off'"]),
    (["model.dropout=abc"], ["model.dropout must be a number; got 'abc'"]),
    (["model.n_layers=true"], ["model.n_layers must be a whole number; got True"]),
    (["~model.n_layers"], ["model lacks n_layers; got"]),
    (
        ["normalization=mixln", "normalization.n_post_layers=1.5"],
        ["normalization.n_post_layers must be a whole number; got 1.5"],
    ),
    (["+data.val_fractoin=0.1"], ["a key of data must be one of", "Did you mean 'val_fraction'?"]),
    (["optimizer.parts.main.build.lr=x"], ["optimizer.parts.main.build failed"]),
    (["+optimizer.parts.main.rolls=[x]"], ["a key of optimizer.parts.main must be one of roles"]),
    (["data.val_fraction=abc"], ["data.val_fraction must be a number; got 'abc'"]),
    (["data.vocab_size=abc"], ["data.vocab_size must be a whole number; got 'abc'"]),
    (["optimizer.schedule.name=cosinus"], ["optimizer.schedule.name", "cosine"]),
    (["optimizer.parts.main.roles=[hidden]"], ["(embedding) is claimed by none of main"]),
    (["optimizer.parts.main.build.betas=[2,0]"], ["optimizer.parts.main.build failed", "beta"]),
    (["model.kind=rnn"], ["model.kind must be one of gpt", "rnn"]),
    (["monitor.skip_first=yes"], ["monitor.skip_first must be a whole number; got 'yes'"]),
    (["monitor.skip_first=32"], ["got monitor.skip_first=32 of data.seq_len=32"]),
    (
        ["monitor.every_n_steps=null"],
        ["must be set, to select the measured steps; got null for both"],
    ),
    (["monitor.steps=log"], ["monitor.steps", "a spacing such as log:30", "got 'log'"]),
    (["monitor.steps=[0,-1]"], ["monitor.steps", "whole numbers from 0", "got [0, -1]"]),
    (
        ["monitor.steps=[0,9,11]", "trainer.max_steps=10"],
        ["monitor.steps takes steps from 0 to trainer.max_steps; got 11"],
    ),
    (
        [f"+callbacks.a._target_={CALLBACKS}.EarlyStopping", "+callbacks.a.monitor=ffn/99/js"],
        ["callbacks.a.monitor must be one of"],
    ),
    (["monitor.skip_first=-1"], ["skip_first must be a whole number of at least 0; got -1"]),
    (["data=digits"], ["model.kind=gpt", "ImageDataModule", "kind=mixer"]),
    (["+data.seed=3"], ["A run sets data.seed itself; got 3", "set seed"]),
    (["+data.n_train_batches=3"], ["sets data.n_train_batches itself", "set trainer.max_steps"]),
    (["+data.n_heldout_tokens=3"], ["sets data.n_heldout_tokens itself", "set monitor.n_tokens"]),
    (["+trainer.num_nodes=0"], ["trainer.num_nodes must be a whole number of at least 1; got 0"]),
    (["+trainer.num_nodes=two"], ["trainer.num_nodes must be a whole number; got 'two'"]),
    *(
        ([f"trainer.devices={n}"], ["accelerator=cpu, trainer.devices is the number of processes"])
        for n in ("[0]", "-1", "'0,1'", "'0,'")
    ),
    (["trainer.accelerator=auto", "trainer.devices=[1,1]"], ["a list of different", "got [1, 1]"]),
    (["monitor.steps=log:100000000000"], ["a spacing such as log:30", "with up to 99,999 steps"]),
    (["data._target_=pathlib.Path"], ["a Lightning data module; pathlib.Path is another class"]),
    (["~optimizer.lr"], ["'optimizer.lr' not found, which optimizer.parts.main.build.lr refers"]),
    (["~optimizer.parts.main.roles"], ["optimizer.parts.main lacks roles; got build"]),
    (["optimizer.schedule=null"], ["optimizer.schedule must be a group of values; got None"]),
    (["trainer._target_=abc"], ["trainer._target_ must name a class; got 'abc'"]),
    (["data.corpus._target_=abc"], ["data.corpus._target_ must name a function; got 'abc'"]),
]
BAD_MIXER = [
    (["monitor.skip_first=1"], ["monitor.skip_first", "model.kind=mixer", "must be 0, got 1"]),
    (["data.n_heldout=abc"], ["data.n_heldout must be a whole number or null; got 'abc'"]),
    (["data.image_size=6", "model.patch_size=4"], ["data.image_size=6", "model.patch_size=4"]),
    (["monitor.n_tokens=512"], ["monitor.n_tokens counts held-out tokens", "got 512"]),
    (["model.token_mixing.width=[1]"], ["model.token_mixing.width must be a whole number or a"]),
    (["data=python_source"], ["model.kind=mixer", "TextDataModule", "kind=gpt"]),
    (["data=cifar100"], ["data.images.path is missing", "data.images.path=…"]),
    (
        ["model.pre_std=1", "ffn.constraint=weight_norm"],
        ["model.pre_std=1 scales", "ffn.constraint=weight_norm"],
    ),
    (["model.channel_mixing.width=0.3"], ["model.channel_mixing.width=0.3", "model.d_model=24"]),
    (["data._target_=nerve.data.Images"], ["data._target_", "nerve.data.Images"]),
]
BAD = [([*GPT, *bad], texts) for bad, texts in BAD_GPT] + [
    ([*MIXER, *bad], texts) for bad, texts in BAD_MIXER
]


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Imports by the first plan of a process do not count."""
    Plan.of(composed(*GPT, "optimizer=soap"))


@pytest.fixture(autouse=True)
def _without_data(monkeypatch):
    """A plan that reads data, or makes a directory or a file, fails."""

    def refuse(*args, **kwargs):
        pytest.fail("a plan reads no data and writes nothing")

    for module in ("text.TextDataModule", "images.ImageDataModule"):
        monkeypatch.setattr(f"nerve.data.{module}.setup", refuse)
    for name in ("corpus.python_source", "image_sets.digits"):
        monkeypatch.setattr(f"nerve.data.{name}", refuse)
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)


@contextmanager
def at_once():
    """Fails if a plan enters too many functions; yields their number, in a list. Objects of other
    tests are not collected meanwhile, because their finalizers would count."""
    calls = [0]
    profile = Profile(builtins=False)
    gc.disable()
    profile.enable()
    try:
        yield calls
    finally:
        profile.disable()
        gc.enable()
    calls[0] = sum(function.callcount for function in profile.getstats())
    assert calls[0] < MOST_CALLS


@pytest.mark.parametrize(("overrides", "expected"), BAD, ids=lambda texts: " ".join(texts)[-50:])
def test_bad_input_is_refused_at_once_with_the_keys(overrides, expected):
    config = composed(*overrides)
    with at_once(), pytest.raises(NerveError) as refusal:
        Plan.of(config)
    for text in expected:
        assert text in str(refusal.value)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("max_time=abc", "'abc'"),
        ("profiler=foo", "`profiler`.*simple"),
        ("gradient_clip_algorithm=foo", "foo is invalid"),
        ("barebones=true", "barebones=True"),
    ],
)
def test_further_options_of_the_trainer_are_checked_by_lightning_before_the_data(option, expected):
    with pytest.raises(NerveError, match=f"trainer cannot be built: .*{expected}"):
        Plan.of(composed(*GPT, f"+trainer.{option}"))


def test_checking_further_options_has_no_effects_and_needs_no_device_of_the_run(caplog):
    """Of a precision that only a GPU has, Lightning would warn that it is replaced."""
    overrides = ["+trainer.min_steps=2", "+trainer.deterministic=true", "trainer=ddp"]
    plan = Plan.of(composed(*GPT, *overrides, "trainer.precision=16-mixed"))
    assert plan.values["trainer"]["min_steps"] == 2
    assert caplog.messages == []
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("devices", "n"), [("4", 4), ("'2'", 2), ("[0,2]", 2), ("'0,1'", 2), ("'0,1,'", 2), ("'3,'", 1)]
)
def test_devices_are_given_as_lightning_takes_them(devices, n):
    plan = Plan.of(composed(*GPT, "trainer.accelerator=auto", f"trainer.devices={devices}"))
    assert n_devices_of(plan.values["trainer"]) == n


HOSTILE = ("delete", None, [], "abc", {})
"""Values of each kind; the first one stands for a deletion."""


def keys_of(values: dict, prefix: str = "") -> Iterator[str]:
    """The dotted keys of groups and values."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


def test_a_value_of_any_kind_is_planned_or_refused():
    """Each value of a configuration in turn is replaced by one of another kind, or deleted: there
    is a plan with its estimate, or an error that a user understands, and no other exception."""
    designs = (
        (*GPT, "optimizer=dion", "regularizer=participation_ratio", "activation=interpolated"),
        (*GPT, "data=text_files", "data.corpus.paths=[a]", "normalization=mixln"),
        MIXER,
    )
    kinds, tried = cycle(HOSTILE), set()
    for overrides in designs:
        stored = OmegaConf.to_container(composed(*overrides))
        for key in keys_of(stored):
            if key in tried:
                continue
            tried.add(key)
            values, hostile = deepcopy(stored), next(kinds)
            *groups, leaf = key.split(".")
            parent = reduce(lambda group, name: group[name], groups, values)
            if hostile == "delete":
                del parent[leaf]
            else:
                parent[leaf] = hostile
            try:
                Estimate.of(Plan.of(OmegaConf.create(values)))
            except NerveError:
                continue
            except Exception as error:
                raise AssertionError(f"{key}={hostile!r}") from error
    assert len(tried) > 100


@pytest.mark.parametrize("preset", PRESETS)
def test_every_shipped_model_is_planned_at_once_with_each_constraint(preset):
    """The last checks are included."""
    path = ["data.images.path=/nowhere"] if preset.startswith("mixer_b") else []
    config = composed("logger=none", f"model={preset}", *path)
    for constraint in CONSTRAINTS:
        config.ffn.constraint = constraint
        with at_once():
            Plan.of(config)


def test_a_plan_costs_the_same_at_any_depth():
    config, calls = composed(*GPT), []
    Plan.of(config)  # the first one of a process does more
    for n_layers in (2, 100_000):
        config.model.n_layers = n_layers
        with at_once() as counted:
            Plan.of(config)
        calls += counted
    assert calls[0] == pytest.approx(calls[1], rel=0.01)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_plan_computes_no_constrained_weight(constraint, monkeypatch):
    """Computing one on the meta device takes milliseconds per matrix."""

    def refuse(*args, **kwargs):
        pytest.fail("a plan needs the shapes of parameters, not the weight that they make")

    monkeypatch.setattr(ParametrizationList, "forward", refuse)
    plan = Plan.of(composed(*GPT, f"ffn.constraint={constraint}"))
    plain = Plan.of(composed(*GPT))
    n_lengths = 2 * (4 * 32 + 32) if constraint == "weight_norm" else 0  # one a row of a matrix
    found, expected = (each.model.skeleton.n_parameters for each in (plan, plain))
    assert found == expected + n_lengths


class Unmeasured(LightningDataModule):
    """Data of a user, whose configuration does not say how long the sequences are."""


def test_positions_are_skipped_in_data_that_does_not_say_how_long_its_sequences_are():
    own = ["data.vocab_size=300", "monitor.skip_first=9"]
    config = composed(*GPT, *own)
    config.data = {"_target_": f"{__name__}.Unmeasured"}
    assert Plan.of(config).monitor.skip_first == 9
    with pytest.raises(NerveError, match="required keyword-only argument: 'seq_len'"):
        Plan.of(composed(*GPT, *own, "~data.seq_len"))


def test_data_may_be_on_another_machine_when_a_run_is_planned():
    text = composed(*GPT, "data.corpus.roots=[/nowhere]", "data.tokenizer=/nowhere.json")
    images = composed(*MIXER, "data=cifar100", "data.images.path=/nowhere")
    data = [Plan.of(config).values["data"] for config in (text, images)]
    assert (data[0]["corpus"]["roots"], data[0]["tokenizer"]) == (["/nowhere"], "/nowhere.json")
    assert data[1]["images"]["path"] == "/nowhere"


def test_values_without_effect_are_planned_as_a_sweep_may_cross_them_and_stored_runs_have_them():
    tokenizer = ["data.tokenizer=a.json", "data.tokenizer_sample_bytes=1000"]
    values = Plan.of(composed(*GPT, *tokenizer, "monitor.groups_every=4")).values
    assert values["data"]["tokenizer_sample_bytes"] == 1000
    assert (values["monitor"]["groups_every"], list(values["monitor"]["groups"])) == (4, [])


def test_a_plan_holds_the_values_that_the_run_uses():
    plan = Plan.of(composed(*GPT, "trainer.accumulate_grad_batches=3", "trainer.max_steps=5"))
    assert plan.data.sizes == {"n_train_batches": 15, "n_heldout_tokens": 8 * 128}
    assert plan.monitor.settings.keys().isdisjoint({"n_tokens", "store"})
    assert (plan.seed, plan.threads, plan.trainer.max_steps) == (0, None, 5)


def test_nothing_is_estimated_if_sizes_depend_on_the_data():
    estimate = Estimate.of(Plan.of(composed(*MIXER)))
    assert (estimate.n_parameters, estimate.memory_bytes) == (None, None)


def n_state(optimizer: torch.optim.Optimizer) -> int:
    """How many numbers an optimizer keeps, not counting counters."""

    def count(value: object) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() if value.ndim else 0
        if isinstance(value, dict):
            return sum(map(count, value.values()))
        return sum(map(count, value)) if isinstance(value, list | tuple) else 0

    return sum(count(state) for state in optimizer.state.values())


@pytest.mark.parametrize(
    "optimizer", ["adamw", "sgd", "adafactor", "muon", "dion", "soap", "shampoo"]
)
def test_the_estimate_equals_the_memory_after_a_step(optimizer):
    """Compared with the tensors of a network after two steps, plus D² or d² for the monitor."""
    config = composed(*GPT, f"optimizer={optimizer}", "data.vocab_size=300")
    with at_once():
        plan = Plan.of(config)
    model = build_model(plan.values, seed=0, vocab_size=300)
    stepper = build_optimizer(model, plan.optimizer.parts)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        stepper.step()
    n = sum(parameter.numel() for parameter in model.parameters())
    covariances = 2 * (128**2 + 32**2)
    estimate = Estimate.of(plan)
    assert estimate.n_parameters == n
    expected = 4 * (2 * n + n_state(stepper)) + 8 * covariances
    assert estimate.memory_bytes == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("shortcut", "width"), [("true", 128), ("projected", 32), ("false", 128)])
def test_with_16_bits_the_covariance_of_the_input_is_kept_only_if_pre_is_projected(shortcut, width):
    def memory(*overrides: str) -> float:
        plan = Plan.of(composed(*GPT, "data.vocab_size=300", *overrides))
        return Estimate.of(plan).memory_bytes

    given = memory("trainer.precision=bf16-mixed", f"monitor.shortcut={shortcut}")
    pre = 2 * 8 * (width**2 - 32**2)
    assert given - memory() == pytest.approx(pre)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_elementwise_optimizers_accept_shards(optimizer):
    plan = Plan.of(composed(*GPT, "trainer=fsdp", f"optimizer={optimizer}"))
    assert plan.values["trainer"]["strategy"] == "fsdp"
    assert plan.values["optimizer"]["name"] == optimizer


@pytest.mark.parametrize("optimizer", ["soap", "shampoo", "muon", "dion", "adafactor"])
def test_optimizers_of_matrices_accept_copies_but_no_shards(optimizer):
    plan = Plan.of(composed(*GPT, "trainer=ddp", f"optimizer={optimizer}"))
    assert plan.values["trainer"]["strategy"] == "ddp"
    assert plan.values["optimizer"]["name"] == optimizer
    with pytest.raises(NerveError, match="flat pieces of matrices"):
        Plan.of(composed(*GPT, "trainer=fsdp", f"optimizer={optimizer}"))


def test_a_callback_may_monitor_what_a_callback_of_the_user_logs():
    own = ("+callbacks.mine._target_=support.KeepWeights",)
    stop = (
        f"+callbacks.a._target_={CALLBACKS}.EarlyStopping",
        "+callbacks.a.monitor=what_mine_logs",
    )
    assert set(Plan.of(composed(*GPT, *own, *stop)).values["callbacks"]) == {"mine", "a"}
    with pytest.raises(NerveError, match="what_mine_logs"):
        Plan.of(composed(*GPT, *stop))


def test_steps_change_the_id_of_a_run_only_if_they_are_given():
    spaced = Plan.of(composed(*GPT, "monitor.every_n_steps=null", "monitor.steps=log:30"))
    assert spaced.monitor.settings["steps"] == "log:30"
    plain = Plan.of(composed(*GPT)).values
    before = {**plain, "monitor": {k: v for k, v in plain["monitor"].items() if k != "steps"}}
    assert config_id(plain) == config_id(before) != config_id(spaced.values)


def test_a_callback_may_monitor_a_layer():
    stop = f"+callbacks.a._target_={CALLBACKS}.EarlyStopping"
    plan = Plan.of(composed(*GPT, stop, "+callbacks.a.monitor=ffn/01/js"))
    assert plan.values["callbacks"]["a"]["monitor"] == "ffn/01/js"
    with pytest.raises(NerveError, match="ffn/01/jss"):
        Plan.of(composed(*GPT, stop, "+callbacks.a.monitor=ffn/01/jss"))
