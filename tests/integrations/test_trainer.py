"""The callback for the Trainer of transformers leaves the rows of the other loops, also resumed."""

import copy
import gc
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pandas as pd
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from integrations.revealing import two_trainers
from processes import together
from support import Batches
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import nerve
from nerve.errors import ConfigError, MeasurementError, StoreError
from nerve.integrations import trainer
from nerve.integrations.losses import StepLosses
from nerve.integrations.trainer_states import TrainerStates
from nerve.measuring.eigenproblem import FFNEigenproblem, FFNSpectra
from nerve.recording import pipeline
from nerve.storage.directory import RunDirectory

N_STEPS = 7
BATCH = 4


class Net(nn.Module):
    """Two residual FFNs in float64 that compute their own loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4)) for _ in range(2)
        )
        self.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = x + block(x)
        return {"loss": (x - labels).square().mean(), "logits": x}


def samples(n: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, 2, 16, 4, generator=generator, dtype=torch.float64)
    return [{"x": x, "labels": y} for x, y in values]


def arguments(folder: Path, **changed) -> TrainingArguments:
    values = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "max_steps": N_STEPS,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**values | changed)


class InOrder(Trainer):
    """Takes the samples in order; transformers 4 has no argument for that."""

    def _get_train_sampler(self, *dataset: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def train(
    folder: Path,
    *,
    accumulate: int = 1,
    resume: str | None = None,
    before=(),
    callbacks=(),
    how=None,
    **asked,
) -> Trainer:
    """Trains to step 7; the run is in `folder`/run."""
    asked = {"every_n_steps": 3} | asked
    callback = nerve.SpectralCallback(folder / "run", **asked)
    trainer = InOrder(
        Net(),
        arguments(folder, gradient_accumulation_steps=accumulate, **how or {}),
        train_dataset=samples(N_STEPS * BATCH * accumulate),
        eval_dataset=samples(2 * BATCH, seed=9),
        callbacks=[*before, callback, *callbacks],
    )
    for each in (*before, *callbacks):
        each.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def batches_of(rows: list[dict[str, Tensor]]) -> Batches:
    return Batches(
        {key: torch.stack([row[key] for row in rows[i : i + BATCH]]) for key in rows[0]}
        for i in range(0, len(rows), BATCH)
    )


class Training(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch)["loss"]

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def in_lightning(folder: Path, source: str, accumulate: int) -> pd.DataFrame:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=N_STEPS,
        accumulate_grad_batches=accumulate,
        callbacks=[nerve.SpectralMonitor(folder, every_n_steps=3, source=source)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=None if source == "heldout" else 0,
    )
    loaders = batches_of(samples(N_STEPS * BATCH * accumulate)), batches_of(samples(2 * BATCH, 9))
    trainer.fit(Training(), *loaders)
    return nerve.load_metrics(folder)


def in_a_plain_loop(folder: Path, source: str, accumulate: int) -> pd.DataFrame:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = batches_of(samples(N_STEPS * BATCH * accumulate))
    heldout = batches_of(samples(2 * BATCH, seed=9))
    given = {"heldout": heldout} if source == "heldout" else {}
    with nerve.watch(model, folder, every_n_steps=3, optimizer=optimizer, **given) as run:
        for step in range(N_STEPS):
            total = torch.zeros(())
            for batch in batches[step * accumulate : (step + 1) * accumulate]:
                loss = model(**batch)["loss"] / accumulate
                loss.backward()
                total = total + loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            run.step(total)
    return nerve.load_metrics(folder)


def assert_same(rows: pd.DataFrame, other: pd.DataFrame, tolerance: float = 1e-12) -> None:
    rows, other = (each.drop(columns=["run_id", "run_status"]) for each in (rows, other))
    pd.testing.assert_frame_equal(rows, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("source", ["train", "heldout"])
def test_the_rows_are_those_of_a_plain_loop_and_of_lightning(tmp_path, source, accumulate):
    train(tmp_path, source=source, accumulate=accumulate)
    expected = in_a_plain_loop(tmp_path / "plain", source, accumulate)
    assert_same(in_lightning(tmp_path / "lightning", source, accumulate), expected)
    rows = nerve.load_metrics(tmp_path / "run")
    assert sorted(set(rows["step"])) == ([0, 3, 6] if source == "train" else [0, 3, 6, 7])
    assert_same(rows, expected)


@pytest.mark.parametrize("source", ["train", "heldout"])
def test_measuring_changes_no_weights_and_leaves_no_hooks(tmp_path, source):
    watched = train(tmp_path, source=source, steps=[1, 2]).model
    alone = Net()
    InOrder(alone, arguments(tmp_path), train_dataset=samples(N_STEPS * BATCH)).train()
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    for module in watched.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_trainer_keeps_its_own_evaluations_and_their_losses_are_noted(tmp_path):
    """Every second step; with source="train", only their losses are used."""
    evaluated: list[int] = []

    class Count(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **others):
            evaluated.append(state.global_step)
            if state.global_step in (0, 3, 6) and heldout:
                assert metrics["eval_ffn/01/pr_post"] > 1

    how = {"eval_strategy": "steps", "eval_steps": 2}
    heldout = False
    train(tmp_path / "a", callbacks=[Count()], how=how)
    rows = nerve.load_metrics(tmp_path / "a" / "run").groupby("step")["val_loss"].first()
    assert evaluated[:3] == [2, 4, 6]
    assert {*evaluated[3:]} <= {7}  # the end, where transformers 5 evaluates, too
    assert rows.notna().tolist() == [False, False, True]
    flags = nerve.flag_runs(nerve.load_metrics(tmp_path / "a"), nerve.load_runs(tmp_path / "a"))
    assert flags["flag"].tolist() == ["ok"]  # with one loss, nothing can be said against it
    evaluated.clear()
    heldout = True
    train(tmp_path / "b", source="heldout", callbacks=[Count()], how=how)
    held = nerve.load_metrics(tmp_path / "b" / "run").groupby("step")["val_loss"].first()
    assert evaluated == [0, 2, 3, 4, 6, 7]
    assert held.index.tolist() == [0, 3, 6, 7]
    assert held[6] == pytest.approx(rows[6], rel=1e-12)


@pytest.mark.parametrize("name", ["ffn/01/pr_post", "eval_ffn/mean/pr_post", "pr_post"])
def test_the_best_model_is_chosen_by_the_values_of_its_own_step(tmp_path, monkeypatch, name):
    """Also if spectra are solved beside training, as on a GPU, and slowly."""
    found: dict[int, float] = {}
    solve = FFNEigenproblem.solve

    def slowly(problem: FFNEigenproblem) -> FFNSpectra:
        time.sleep(0.05)
        return solve(problem)

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **others):
            found[state.global_step] = metrics[f"eval_{name.removeprefix('eval_')}"]

    monkeypatch.setattr(pipeline, "spare_workers", lambda *how: 1)
    monkeypatch.setattr(FFNEigenproblem, "solve", slowly)
    how = {"metric_for_best_model": name, "eval_strategy": "steps", "eval_steps": 3}
    how |= {"save_strategy": "best", "greater_is_better": True}
    train(tmp_path, source="heldout", callbacks=[Keep()], how=how)
    rows = nerve.load_metrics(tmp_path / "run")
    rows = rows[rows["layer"] == 1] if "01" in name else rows
    expected = rows.groupby("step")["pr_post"].mean().to_dict()
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("source", ["train", "heldout"])
def test_of_several_evaluation_sets_the_first_is_measured(tmp_path, source):
    found = {}
    for name, sets in (
        ("one", {"own": samples(2 * BATCH, seed=9)}),
        ("two", {"own": samples(2 * BATCH, seed=9), "other": samples(BATCH, seed=8)}),
    ):
        spectra = nerve.SpectralCallback(tmp_path / name, every_n_steps=1, source=source)
        how = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
        data = samples(2 * BATCH)
        InOrder(Net(), how, train_dataset=data, eval_dataset=sets, callbacks=[spectra]).train()
        found[name] = nerve.load_metrics(tmp_path / name)
    assert found["one"]["val_loss"].notna().tolist()[-2:] == [True, True]
    assert_same(found["one"], found["two"])


class Raise(TrainerCallback):
    def on_step_begin(self, args, state, control, **others):
        if state.global_step == 5:
            raise ValueError("no")


@pytest.mark.parametrize("source", ["train", "heldout"])
@pytest.mark.parametrize("save_at", [3, 4])
def test_an_interrupted_training_is_resumed_as_if_uninterrupted(tmp_path, source, save_at):
    """From a measured step, before its features are there, and from one between two of them."""
    how = {"save_strategy": "steps", "save_steps": save_at}
    train(tmp_path / "whole", source=source, how=how)
    cut = tmp_path / "cut"
    with pytest.raises(ValueError, match="no") as raised:  # which keeps the callback alive
        train(cut, source=source, how=how, callbacks=[Raise()])
    checkpoint = str(cut / "trainer" / f"checkpoint-{save_at}")
    train(cut, source=source, how=how, resume=checkpoint)
    assert_same(*(nerve.load_metrics(each / "run") for each in (cut, tmp_path / "whole")))
    record = nerve.RunRecord.load(cut / "run")
    assert (record.run_status, record.restarts) == ("done", 1)
    del raised
    again = nerve.RunRecord.load(tmp_path / "whole" / "run")
    assert record.config_id == again.config_id
    with pytest.raises(StoreError, match=rf"state of steps {save_at}.* resumes at step 2"):
        TrainerStates(RunDirectory(cut / "run")).load(2)


class RaiseOnce(TrainerCallback):
    """Raises in the first evaluation."""

    has_raised = False

    def on_prediction_step(self, args, state, control, **others):
        if not self.has_raised:
            self.has_raised = True
            raise ValueError("no")


def test_a_start_that_fails_leaves_the_arguments_as_they_were(tmp_path):
    """The evaluation of step 0 is asked for through them."""
    trainer = InOrder(
        Net(),
        arguments(tmp_path),
        train_dataset=samples(N_STEPS * BATCH),
        eval_dataset=samples(BATCH, seed=9),
        callbacks=[nerve.SpectralCallback(tmp_path / "run", source="heldout"), RaiseOnce()],
    )
    with pytest.raises(ValueError, match="no"):
        trainer.train()
    trainer.train()
    assert not trainer.args.eval_on_start
    assert nerve.RunRecord.load(tmp_path / "run").run_status == "done"


def test_a_run_that_is_never_ended_has_failed_when_its_callback_is_deleted(tmp_path, monkeypatch):
    """As at the end of the program: the Trainer does not report exceptions to callbacks."""
    with pytest.raises(ValueError, match="no") as raised:
        train(tmp_path, callbacks=[Raise()])
    assert nerve.RunRecord.load(tmp_path / "run").run_status == "running"
    monkeypatch.setattr(sys, "last_value", raised.value, raising=False)
    raised.value.__traceback__ = None
    del raised
    gc.collect()
    record = nerve.RunRecord.load(tmp_path / "run")
    assert record.error is not None
    assert (record.run_status, record.error["type"]) == ("failed", "ValueError")
    assert sorted(set(nerve.load_metrics(tmp_path / "run")["step"])) == [0, 3]


def evaluated(folder: Path, within=lambda model: None, **how) -> pd.DataFrame:
    """The rows of a model whose weights are measured in an evaluation of two batches, before which,
    in whose steps and after which `within` may run the model."""
    model = language_model(torch.float64)
    layer = model.transformer.h[0].mlp.c_fc
    layer._disable_adapters, layer._active_adapter = False, ["default"]  # as in PEFT
    data = batches_of(texts(2 * BATCH))
    callback = nerve.SpectralCallback(folder, source="heldout", **how)
    given = TrainingArguments(folder / "hf", use_cpu=True), TrainerState(max_steps=9)
    control = TrainerControl()
    callback.on_train_begin(*given, control, model=model)

    def prediction_step(batch: dict[str, Tensor]) -> None:
        within(model)
        model(**batch)

    def evaluate() -> None:
        for batch in data:
            prediction_step(batch)

    model.eval()
    with torch.no_grad():
        within(model)
        evaluate()
        within(model)
    metrics: dict[str, float] = {"eval_runtime": 1.0, "eval_loss": 2.0}
    callback.on_evaluate(*given, control, metrics=metrics, eval_dataloader=data)
    assert metrics["eval_ffn/01/pr_post"] > 1
    rows = pd.DataFrame(callback.latest)
    callback.on_train_end(*given, control)
    return rows


def test_groups_by_frequency_need_the_counts_of_the_tokens(tmp_path):
    counts = torch.arange(100, dtype=torch.int64)
    evaluated(tmp_path / "run", groups=["frequency"], token_counts=counts)
    groups = nerve.load_groups(tmp_path / "run")
    assert {*groups["group"]} == {"all", "head", "mid", "tail"}
    with pytest.raises(ConfigError, match="frequency need token_counts"):
        nerve.SpectralCallback(tmp_path / "other", groups=["frequency"])


def test_an_evaluation_on_tokens_is_measured_despite_inspection_and_generation(tmp_path):
    """The model is run to see which tokens an FFN has, which is not part of the evaluation."""

    def generate(model: GPT2LMHeadModel) -> None:
        for use_cache in (True, False):
            tokens = torch.ones(2, 3, dtype=torch.long)
            model.generate(tokens, max_new_tokens=2, use_cache=use_cache, do_sample=False)

    def as_reference(model: GPT2LMHeadModel) -> None:
        layer = model.transformer.h[0].mlp.c_fc
        for off, active in ((True, ["default"]), (False, ["ref"])):
            layer._disable_adapters, layer._active_adapter = off, active
            model(**some[0])
        layer._disable_adapters, layer._active_adapter = False, ["default"]

    expected = nerve.measure(language_model(torch.float64), batches_of(texts(2 * BATCH)))
    some = [dict(batches_of(texts(BATCH))[0])]
    for name, within in {
        "alone": lambda model: None,
        "measured": lambda model: nerve.measure(model, some),
        "generates": generate,
        "compares": as_reference,
    }.items():
        rows = evaluated(tmp_path / name, within)
        assert rows["n_samples"].tolist() == expected["n_samples"].tolist()
        assert rows["pr_post"].tolist() == pytest.approx(expected["pr_post"].tolist(), rel=1e-12)


class Runs(TrainerCallback):
    """Runs the model on its own batch in every callback."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self._batch = batches_of(samples(BATCH, seed=3))[0]
        self._is_running = False

    def _run(self, args, state, control, model, **others):
        if self._is_running or self.trainer is None:
            return
        self._is_running = True
        modes = model.training
        for training in (True, False):
            with torch.set_grad_enabled(training):
                loss = model.train(training)(**self._batch)["loss"]
                if training:  # its sharpness, say
                    torch.autograd.grad(loss, list(model.parameters()))
        self.trainer.predict(samples(BATCH, seed=4))
        self.trainer.evaluate(samples(BATCH, seed=5), metric_key_prefix="own")
        own = self.trainer.get_eval_dataloader(samples(BATCH, seed=6))
        self.trainer.evaluation_loop(own, "own", metric_key_prefix="own")
        model.train(modes)
        self._is_running = False

    on_step_begin = on_substep_end = on_step_end = on_prediction_step = on_evaluate = on_log = _run


@pytest.mark.parametrize("place", ["before", "callbacks"])
@pytest.mark.parametrize("source", ["train", "heldout"])
def test_passes_that_callbacks_run_are_neither_training_nor_evaluation(tmp_path, source, place):
    """Before the first batch, between batches and after the last one, whichever callback is told
    first; the losses are the same."""
    how = {"max_steps": 3, "logging_strategy": "steps", "logging_steps": 1}
    asked = {"source": source, "accumulate": 2, "every_n_steps": 2, "how": how}
    train(tmp_path / "alone", **asked)
    train(tmp_path / "beside", **asked, **{place: [Runs()]})
    assert_same(*(nerve.load_metrics(tmp_path / each / "run") for each in ("alone", "beside")))


def test_a_loss_without_a_backward_pass_is_not_a_training_loss():
    """Some trainers compute their own loss from the logits, although the model returns one."""
    model, batch = language_model(torch.float64), batches_of(texts(BATCH))[0]
    losses, given = StepLosses(model, of_all=False), []
    recorder = SimpleNamespace(add_training=lambda *how, **more: given.append(how))
    output = model(**batch)
    output.logits.sum().backward()
    losses.give(recorder)
    assert given == []
    loss = model(**batch).loss
    expected = loss.item()
    loss /= 2
    loss.backward()
    copy.deepcopy(model)(**batch).loss.backward()
    losses.give(recorder)
    losses.close()
    assert [(float(mean), n) for mean, n in given] == [(expected, None)]


def test_a_new_run_directory_starts_at_the_step_where_the_trainer_resumes(tmp_path, caplog):
    how = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path / "whole", how=how)
    saved = tmp_path / "whole" / "trainer" / "checkpoint-3"
    train(tmp_path / "late", how=how, resume=str(saved))
    assert "begins at step 3 of the Trainer" in caplog.text
    whole, late = (nerve.load_metrics(tmp_path / each / "run") for each in ("whole", "late"))
    assert sorted(set(late["step"])) == [3, 6]
    expected = whole[whole["step"] > 0].reset_index(drop=True)
    expected.loc[expected["step"] == 3, "train_loss"] = float("nan")
    assert_same(late, expected)


@pytest.mark.parametrize(
    ("n_examples", "even_batches", "n_sequences", "is_refused"),
    [
        (12, True, 6, False),
        (12, True, 12, False),  # each of two sequences, as pairs of preferences are
        (10, True, 6, True),  # of which 2 come twice
        (10, True, 12, True),
        (10, False, 10, False),
        (10, False, 5, False),
    ],
)
def test_examples_that_several_processes_evaluate_twice_are_refused(
    monkeypatch, n_examples, even_batches, n_sequences, is_refused
):
    """Two processes with batches of 3; both evaluate `n_sequences`."""
    monkeypatch.setattr(trainer, "n_processes", lambda: 2)
    monkeypatch.setattr(trainer, "gathered", lambda n: [n, n])
    loader = DataLoader(range(n_examples), batch_size=3)
    sampler = BatchSamplerShard(loader.batch_sampler, 2, even_batches=even_batches)
    sharded = DataLoader(range(n_examples), batch_sampler=sampler)
    if is_refused:
        with pytest.raises(MeasurementError, match="a multiple of processes times"):
            trainer.require_once(n_sequences, sharded)
    else:
        trainer.require_once(n_sequences, sharded)
    with pytest.raises(MeasurementError, match="must be evaluated once"):
        trainer.require_once(n_examples, loader)  # of which nothing is known


def in_processes(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}  # as torchrun has it
    for source in ("train", "heldout"):
        how = {"per_device_train_batch_size": BATCH // 2, "ddp_backend": "gloo"}
        train(Path(folder, source), source=source, how=how)
    how = {"per_device_eval_batch_size": 3, "ddp_backend": "gloo"}
    with pytest.raises(MeasurementError, match=r"evaluated 12 for an eval_dataset of 8"):
        train(Path(folder, "twice"), source="heldout", how=how)


def test_two_processes_leave_the_rows_of_one(tmp_path):
    """Each batch is split between them, by rows or by halves: the samples are the same."""
    together(two_trainers, 2, tmp_path)
    for source in ("train", "heldout"):
        train(tmp_path / f"{source}-one", source=source)
        one, two = (
            nerve.load_metrics(tmp_path / each / "run") for each in (f"{source}-one", source)
        )
        assert_same(one, two, 1e-9)


def language_model(dtype: torch.dtype) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 20}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **rates, bos_token_id=0, eos_token_id=0)).to(dtype)


def texts(n: int) -> list[dict[str, Tensor]]:
    """Sequences of 12 tokens, every second one padded after 7, whose padding has no label."""
    tokens = torch.randint(1, 20, (n, 12), generator=torch.Generator().manual_seed(1))
    found = []
    for i, ids in enumerate(tokens):
        mask = torch.ones(12, dtype=torch.long)
        mask[7:] = 1 - i % 2
        found.append(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": ids.masked_fill(mask == 0, -100),
            }
        )
    return found


# Dynamo's own look at a tensor, where a graph breaks.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "how",
    [{}, {"bf16": True}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}],
    ids=["float32", "bf16", "compiled"],
)
def test_a_language_model_is_measured_as_it_is_trained(tmp_path, how):
    """Padding and excluded tokens do not count; losses are means over both micro-batches."""
    data, losses = texts(3 * 2 * BATCH), []
    counted = {"exclude": [3], "only_labeled": True}
    dtype = torch.float32 if "bf16" in how else torch.float64

    class Loss(TrainerCallback):
        def on_log(self, args, state, control, logs, **others):
            losses.append(logs.get("loss"))

    trainer = InOrder(
        language_model(dtype),
        arguments(
            tmp_path,
            max_steps=3,
            gradient_accumulation_steps=2,
            **{"logging_strategy": "steps", "logging_steps": 1} | how,
        ),
        train_dataset=data,
        callbacks=[nerve.SpectralCallback(tmp_path / "run", every_n_steps=1, **counted), Loss()],
    )
    trainer.train()
    rows = nerve.load_metrics(tmp_path / "run")
    batches = batches_of(data[: 2 * BATCH])
    model = language_model(dtype)
    exact = nerve.measure(model, batches, **counted)
    n_counted = sum(
        int((ids != 3).sum()) for ids in (x["labels"][x["labels"] > 0] for x in batches)
    )
    if "bf16" in how:
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    by_hand = nerve.measure(model, batches, **counted)
    assert (by_hand["pr_post"] == exact["pr_post"]).all() == ("bf16" not in how)
    measured = rows[rows["step"] == 0]
    assert measured["n_samples"].tolist() == by_hand["n_samples"].tolist() == [n_counted] * 2
    for name in ("pr_pre", "pr_post", "js", "variance_post"):
        assert measured[name].tolist() == pytest.approx(by_hand[name].tolist(), rel=1e-9)
    told = rows.groupby("step")["train_loss"].first()
    assert told[[1, 2]].tolist() == pytest.approx(losses[:2], rel=1e-4)
    assert rows.groupby("step")["tokens_seen"].first().tolist() == [
        0,
        76,
        152,
    ]  # as it counts labels


@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_a_model_without_a_loss_of_its_own_is_measured(tmp_path, form):
    """Like a classifier whose labels compute_loss weights, or with label smoothing."""

    class Losses(InOrder):
        def compute_loss(self, model, inputs, return_outputs=False, **others):
            output = model(inputs["x"])
            logits = output["logits"] if form == "mapping" else output[0]
            loss = (logits - inputs["labels"]).square().mean()
            return (loss, output) if return_outputs else loss

    class Logits(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor] | tuple[Tensor]:
            logits = super().forward(x, x)["logits"]
            return {"logits": logits} if form == "mapping" else (logits,)

    callback = nerve.SpectralCallback(tmp_path / "run", every_n_steps=3)
    data = samples(N_STEPS * BATCH)
    given = arguments(tmp_path, remove_unused_columns=False)
    Losses(Logits(), given, train_dataset=data, callbacks=[callback]).train()
    rows = nerve.load_metrics(tmp_path / "run")
    assert sorted(set(rows["step"])) == [0, 3, 6]
    assert rows["train_loss"].isna().all()


def test_invalid_arguments_are_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"^source must be one of heldout, train"):
        nerve.SpectralCallback(tmp_path, source="eval")
    with pytest.raises(ConfigError, match="mask must be a function"):
        nerve.SpectralCallback(tmp_path, mask=torch.ones(3))
    with pytest.raises(ConfigError, match="config must be a mapping"):
        nerve.SpectralCallback(tmp_path, config="mine")
    with pytest.raises(ConfigError, match="would measure nothing: it ends at step 7"):
        train(tmp_path, every_n_steps=None, steps=[7])
    with pytest.raises(ConfigError, match="to select the measured steps"):
        train(tmp_path, every_n_steps=None)
