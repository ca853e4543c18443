"""The callback measures the right weights on the right tokens, and changes nothing."""

import copy
import gc
import threading
import time
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from language_models import SEQ, language_model
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from support import Batches, KeepWeights
from torch.utils.checkpoint import checkpoint

import nerve
import nerve.recording.recorder as spectra_recorder
import nerve.training.fit as fit_module
from nerve.data.batches import BatchLoader
from nerve.errors import ConfigError, DivergedError, MeasurementError
from nerve.measuring.eigenproblem import FFNEigenproblem
from nerve.measuring.ffns import FFNAdapter
from nerve.optim import Schedule
from nerve.recording.heartbeat import Heartbeat
from nerve.recording.solver import MOST_PENDING
from nerve.recording.writer import logged_values, mean_values, monitored_values
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore
from nerve.training.callbacks import StepNotes
from nerve.training.loggers import StoreLogger
from nerve.training.module import LanguageModel
from nerve.training.monitor import FitMonitor

VOCAB, BATCH = 13, 4
METRICS = ["se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js"]


def make_module(**given) -> LanguageModel:
    schedule = Schedule("constant", warmup=0.2, cooldown=0.0)
    return language_model(VOCAB, schedule, **given)


def batches(n: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (n, BATCH, SEQ + 1), generator=generator)
    return [(t[:, :-1], t[:, 1:]) for t in tokens]


def fit(
    directory,
    module,
    train,
    heldout,
    *,
    before=(),
    callbacks=(),
    loggers=(),
    accumulate=1,
    precision=None,
    **monitor,
):
    """Trains with a monitor; returns it and the rows that it stored."""
    store = RunStore(directory, "run")
    RunRecord.create(directory, {}, run_id="run")
    callback = FitMonitor(store, **monitor)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=len(train) // accumulate,
        max_epochs=-1,
        precision=precision,
        accumulate_grad_batches=accumulate,
        callbacks=[*before, callback, *callbacks],
        logger=[StoreLogger(store), *loggers],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches(train), Batches(heldout))
    store.flush(trainer.global_step)
    return callback, nerve.load_metrics(directory)


@pytest.mark.parametrize("source", ["heldout", "train"])
def test_a_row_holds_the_features_of_the_weights_after_that_many_steps(tmp_path, source):
    module, kept = make_module(), KeepWeights()
    train, heldout = batches(7), batches(3, seed=1)
    _, rows = fit(
        tmp_path, module, train, heldout, callbacks=[kept], every_n_steps=2, source=source
    )
    steps = [0, 2, 4, 6, 7] if source == "heldout" else [0, 2, 4, 6]
    assert sorted(rows.step.unique()) == steps
    for step in steps:
        module.model.load_state_dict(kept.after[step])
        inputs = [x for x, _ in heldout] if source == "heldout" else [train[step][0]]
        by_hand = nerve.measure(module.model, inputs)
        stored = rows[rows.step == step].sort_values("layer")
        np.testing.assert_array_equal(stored[METRICS], by_hand[METRICS])
        np.testing.assert_array_equal(stored.n_samples, by_hand.n_samples)


def test_loss_and_tokens_stand_in_the_row_of_their_step(tmp_path):
    module, kept = make_module(), KeepWeights()
    train, heldout = batches(4), batches(3, seed=1)
    _, rows = fit(tmp_path, module, train, heldout, callbacks=[kept], every_n_steps=2)

    def loss(step: int, batch) -> float:
        module.model.load_state_dict(kept.after[step])
        with torch.no_grad():
            logits = module(batch[0])
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten()))

    for step in (0, 2, 4):
        val_loss = np.mean([loss(step, batch) for batch in heldout])
        row = rows[rows.step == step].iloc[0]
        assert row.val_loss == pytest.approx(val_loss, rel=1e-6)
        assert row.tokens_seen == step * BATCH * SEQ
        if step:
            mean = np.mean([loss(s, train[s]) for s in (step - 2, step - 1)])
            assert row.train_loss == pytest.approx(mean, rel=1e-6)
    assert pd.isna(rows[rows.step == 0].train_loss).all()
    # What the next update would use: constant after one warm-up step; over at the end.
    assert rows.groupby("step").lr.first().tolist() == pytest.approx([1e-2, 1e-2, 0.0])


def test_both_sources_agree_on_the_same_tokens(tmp_path):
    """The held-out data is the training batch; only the mode of the model differs."""
    batch = batches(1)
    _, heldout = fit(tmp_path / "a", make_module(), batch * 5, batch, every_n_steps=1)
    _, train = fit(tmp_path / "b", make_module(), batch * 5, batch, every_n_steps=1, source="train")
    assert sorted(train.step.unique()) == [0, 1, 2, 3, 4]
    same = heldout[heldout.step < 5]
    np.testing.assert_array_equal(same[METRICS], train[METRICS])
    np.testing.assert_array_equal(same[["val_loss", "lr"]], train[["val_loss", "lr"]])


@pytest.mark.parametrize("source", ["heldout", "train"])
def test_accumulated_micro_batches_make_one_measurement(tmp_path, source):
    module, kept = make_module(), KeepWeights()
    train = batches(8)
    _, rows = fit(
        tmp_path,
        module,
        train,
        batches(2, seed=1),
        callbacks=[kept],
        accumulate=2,
        every_n_steps=3,
        source=source,
    )
    assert sorted(rows.step.unique()) == ([0, 3, 4] if source == "heldout" else [0, 3])
    assert (rows.n_samples == 2 * BATCH * SEQ).all()
    assert rows[rows.step == 3].tokens_seen.iloc[0] == 6 * BATCH * SEQ
    if source == "train":
        module.model.load_state_dict(kept.after[3])
        by_hand = nerve.measure(module.model, [x for x, _ in train[6:8]])
        np.testing.assert_array_equal(rows[rows.step == 3][METRICS], by_hand[METRICS])


@pytest.mark.parametrize("source", ["heldout", "train"])
@pytest.mark.parametrize(
    "groups",
    [
        {"model": {"dropout": 0.2}},
        {"ffn": {"constraint": "spectral_norm"}},
        {"ffn": {"constraint": "weight_norm", "gated": True}},
        {"ffn": {"constraint": "hyperspherical"}},
    ],
    ids=lambda groups: "-".join(str(v) for changes in groups.values() for v in changes.values()),
)
def test_training_is_bit_identical_with_and_without_the_monitor(tmp_path, groups, source):
    def weights(monitored: bool):
        torch.manual_seed(0)
        module, train = make_module(**groups), batches(10)
        if monitored:
            fit(tmp_path, module, train, batches(2, seed=1), every_n_steps=3, source=source)
        else:
            L.Trainer(
                accelerator="cpu",
                max_steps=10,
                max_epochs=-1,
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(module, Batches(train), Batches(train))
        return module.model.state_dict()

    alone, watched = weights(False), weights(True)
    assert all(torch.equal(alone[name], watched[name]) for name in alone)


def test_spectra_are_stored_where_asked_for(tmp_path):
    _, rows = fit(tmp_path, make_module(), batches(2), batches(2), every_n_steps=2, spectra=True)
    spectra = nerve.load_spectra(tmp_path)
    assert len(spectra) == 2 * len(rows)
    row = rows.iloc[0]
    stored = spectra[(spectra.step == row.step) & (spectra.layer == row.layer)]
    pre = stored[stored.site == "pre"].eigenvalues.iloc[0].astype(np.float64)
    assert (np.diff(pre) <= 0).all()
    assert pre.sum() ** 2 / np.square(pre).sum() == pytest.approx(row.pr_pre, rel=1e-5)
    fit(tmp_path / "none", make_module(), batches(2), batches(2), every_n_steps=2, spectra=False)
    assert not list((tmp_path / "none" / "spectra").glob("*.parquet"))


def test_scalars_carry_the_step_of_the_weights(tmp_path):
    """Training and validation losses labeled s are those of the weights after s steps."""
    _, rows = fit(tmp_path, make_module(), batches(4), batches(2, seed=1), every_n_steps=2)
    scalars = nerve.load_scalars(tmp_path)
    train = scalars[scalars.name == "train_loss"].set_index("step").value
    val = scalars[scalars.name == "val_loss"].set_index("step").value
    assert train.index.tolist() == [0, 1, 2, 3]
    assert val.index.tolist() == [2, 4]
    expected = rows.groupby("step").val_loss.first()
    np.testing.assert_allclose(val, expected[val.index], rtol=1e-6)
    means = rows.groupby("step").train_loss.first()
    np.testing.assert_allclose([train[:2].mean(), train[2:].mean()], means[[2, 4]], rtol=1e-6)


def test_compiled_training_is_measured_and_unmeasured_steps_keep_their_graph(tmp_path, graphs):
    """One graph with taps and one without, each compiled once, however often steps alternate."""
    rows, weights = {}, {}
    for name, every in (("compiled", 3), ("eager", 3), ("never", 100)):
        module = make_module(compile=name != "eager", model={"n_layers": 1})
        values = {"every_n_steps": every, "source": "train"}
        graphs.clear()
        rows[name] = fit(tmp_path / name, module, batches(8), batches(2, seed=1), **values)[1]
        weights[name] = module.model.state_dict()
        taps = [any("nerve.tap" in str(n.target) for n in g.graph.nodes) for g in graphs]
        assert sorted(taps) == ([] if name == "eager" else [False, True])
    assert sorted(rows["compiled"].step.unique()) == [0, 3, 6]
    np.testing.assert_allclose(rows["compiled"][METRICS], rows["eager"][METRICS], rtol=1e-5)
    assert all(
        torch.equal(weights["never"][key], weights["compiled"][key]) for key in weights["never"]
    )


def test_a_model_that_was_compiled_before_is_measured(tmp_path, graphs):
    """Code compiled without a probe is recompiled, for this fit and for the next."""
    module, rows = make_module(compile=True, model={"n_layers": 1}), []
    module._training_losses(batches(1)[0])[0].backward()
    module.zero_grad()
    state = copy.deepcopy(module.model.state_dict())
    for name in ("a", "b"):
        module.model.load_state_dict(state)
        values = {"every_n_steps": 2, "source": "train"}
        rows.append(fit(tmp_path / name, module, batches(4), batches(1), **values)[1])
    assert sorted(rows[0].step.unique()) == [0, 2]
    np.testing.assert_allclose(rows[0][METRICS], rows[1][METRICS], rtol=1e-6)


def test_recomputed_activations_are_not_counted_again(tmp_path):
    """Activation checkpointing runs the FFNs' forward pass again in the backward pass."""
    rows, runs = {}, []
    for name in ("kept", "recomputed"):
        module = make_module()
        for block in module.model.blocks:
            if name == "recomputed":
                block.ffn.up.register_forward_pre_hook(lambda *_: runs.append(1))
                block.ffn.forward = partial(checkpoint, block.ffn.forward, use_reentrant=False)
        values = {"every_n_steps": 2, "source": "train"}
        rows[name] = fit(tmp_path / name, module, batches(4), batches(1), **values)[1]
    n_trained, n_validated = 4 * 2, 3 * 2  # steps, and validations at 0, 2 and 4, of two layers
    assert len(runs) == 2 * n_trained + n_validated, "nothing was computed again"
    assert (rows["recomputed"].n_samples == BATCH * SEQ).all()
    np.testing.assert_array_equal(rows["kept"][METRICS], rows["recomputed"][METRICS])


def test_mixed_precision_measures_the_features_as_they_are_and_without_autocast(tmp_path):
    """bfloat16 features, and the spectra that float64 NumPy computes from them."""
    module, taken = make_module(), {}
    heldout = batches(2, seed=1)
    down = module.model.blocks[1].ffn.post
    down.register_forward_pre_hook(lambda _, x: taken.setdefault("post", []).append(x[0].detach()))
    _, rows = fit(tmp_path, module, batches(1), heldout, every_n_steps=9, precision="bf16-mixed")
    features = torch.cat([x.flatten(0, 1) for x in taken["post"][:2]])
    assert features.dtype == torch.bfloat16
    spectrum = np.linalg.eigvalsh(np.cov(features.double().numpy().T))
    row = rows[(rows.step == 0) & (rows.layer == 1)].iloc[0]
    assert row.pr_post == pytest.approx(spectrum.sum() ** 2 / (spectrum**2).sum(), rel=1e-5)
    assert row.variance_post == pytest.approx(spectrum.sum(), rel=1e-5)


@pytest.mark.parametrize("source", ["heldout", "train"])
def test_mixed_precision_may_project_pre_and_trains_the_same(tmp_path, source):
    """The rows record it; apart from pre they are equal, and the weights are bit-identical."""
    rows, weights = {}, {}
    for shortcut in (True, "projected"):
        module = make_module()
        values = {"every_n_steps": 1, "source": source, "shortcut": shortcut}
        given = (batches(2), batches(2, seed=1))
        _, rows[shortcut] = fit(
            tmp_path / str(shortcut), module, *given, precision="bf16-mixed", **values
        )
        weights[shortcut] = module.model.state_dict()
    full, projected = rows[True], rows["projected"]
    assert set(projected["precision"]) == {"projected_bfloat16"}
    assert (full["se_post"] == projected["se_post"]).all()
    assert 0 < (full["se_pre"] - projected["se_pre"]).abs().max() < 1e-3
    assert all(torch.equal(weights[True][key], weights["projected"][key]) for key in weights[True])


def test_a_last_batch_of_another_size_counts_with_its_own_samples(tmp_path):
    heldout = batches(2, seed=1)
    heldout[1] = tuple(part[:1] for part in heldout[1])
    module = make_module()
    by_hand = nerve.measure(module.model, [x for x, _ in heldout])
    _, rows = fit(tmp_path, module, batches(1), heldout, every_n_steps=9)
    first = rows[rows.step == 0]
    assert (first.n_samples == (BATCH + 1) * SEQ).all()
    np.testing.assert_array_equal(first[METRICS], by_hand[METRICS])


@pytest.mark.parametrize("source", ["heldout", "train"])
def test_padding_is_left_out(tmp_path, source):
    """Whatever the padding contains, the spectra are those of the other tokens."""

    class Padded(LanguageModel):
        def padding_mask(self, batch):
            return batch[0] > 0

    module, heldout = make_module(), batches(2, seed=1)
    padded = Padded(module.model, module._build_optimizer, module._schedule)
    inputs = [x for x, _ in heldout]
    by_hand = nerve.measure(module.model, inputs, mask=lambda x: x > 0)
    whole = nerve.measure(module.model, inputs)
    _, rows = fit(tmp_path, padded, heldout, heldout, every_n_steps=9, source=source)
    first = rows[rows.step == 0]
    expected = by_hand if source == "heldout" else None
    if expected is None:
        module = make_module()
        expected = nerve.measure(module.model, inputs[:1], mask=lambda x: x > 0)
    np.testing.assert_array_equal(first.n_samples, expected.n_samples)
    np.testing.assert_array_equal(first[METRICS], expected[METRICS])
    assert (expected.pr_post < whole.pr_post).all()


def test_chosen_layers_are_measured_and_no_others(tmp_path):
    _, every = fit(tmp_path / "all", make_module(), batches(2), batches(1), every_n_steps=2)
    _, one = fit(
        tmp_path / "one", make_module(), batches(2), batches(1), every_n_steps=2, layers=[1]
    )
    same = every[every.layer == 1]
    np.testing.assert_array_equal(one[["layer", *METRICS]], same[["layer", *METRICS]])
    with pytest.raises(MeasurementError, match="with FFNs, 0, 1; got 2"):
        fit(tmp_path / "no", make_module(), batches(2), batches(1), every_n_steps=2, layers=[1, 2])


class Foreign(L.LightningModule):
    """A model and an optimizer that know nothing of nerve."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.proj = torch.nn.Linear(VOCAB, 24), torch.nn.Linear(24, VOCAB)

    def ffns(self) -> list[FFNAdapter]:
        return [FFNAdapter(0, "ffn", self.fc, self.proj)]

    def training_step(self, batch, batch_idx):
        inputs = torch.nn.functional.one_hot(batch[0], VOCAB).float()
        logits = self.proj(torch.relu(self.fc(inputs)))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        return {"loss": loss, "n_targets": batch[1].numel()}

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_a_model_of_ones_own_is_described_and_its_run_read_as_any_other(tmp_path):
    """As described in the docs."""
    module = Foreign()
    train, heldout = batches(4), batches(2, seed=1)
    _, rows = fit(tmp_path, module, train, heldout, every_n_steps=2, ffns=module.ffns())
    assert rows["step"].tolist() == [0, 2, 4]
    assert set(rows["lr"]) == {0.01}
    assert set(rows["d_ff"]) == {24}


@pytest.mark.parametrize("source", ["heldout", "train"])
def test_the_first_positions_are_left_out_of_the_features_alone(tmp_path, source):
    module, train, heldout = (
        make_module(optimizer=partial(torch.optim.AdamW, lr=0.0)),
        batches(3),
        batches(1, seed=1),
    )
    _, rows = fit(tmp_path / "a", module, train, heldout, every_n_steps=1, source=source)
    _, fewer = fit(
        tmp_path / "b", module, train, heldout, every_n_steps=1, source=source, skip_first=3
    )
    x = heldout[0][0] if source == "heldout" else train[0][0]
    by_hand = nerve.measure(module.model, [x], mask=lambda _: torch.arange(SEQ).expand(x.shape) > 2)
    first = fewer[fewer.step == 0].sort_values("layer")
    assert set(first.n_samples) == {BATCH * (SEQ - 3)}
    np.testing.assert_allclose(first[METRICS], by_hand[METRICS], rtol=1e-6)
    np.testing.assert_array_equal(fewer.val_loss, rows.val_loss)


@pytest.mark.parametrize("source", ["heldout", "train"])
def test_groups_and_sites_are_measured_with_every_second_measurement(tmp_path, source):
    """Compared with a computation by hand; the pooled rows are the same as without groups."""
    module, train, heldout = (
        make_module(optimizer=partial(torch.optim.AdamW, lr=0.0)),
        batches(4),
        batches(2, seed=1),
    )
    given = {"every_n_steps": 1, "source": source}
    _, rows = fit(tmp_path / "a", module, train, heldout, **given)
    asked = {"groups": ["position", "halves"], "sites": ["stream_in", "output"]}
    _, same = fit(tmp_path / "b", module, train, heldout, **given, **asked, groups_every=2)
    np.testing.assert_allclose(same[METRICS], rows[METRICS], rtol=2e-5, atol=1e-7)
    groups = nerve.load_groups(tmp_path / "b")
    assert sorted(groups["step"].unique()) == ([0, 2, 4] if source == "heldout" else [0, 2])
    inputs = [x for x, _ in heldout] if source == "heldout" else [train[2][0]]
    nerve.measure(module.model, inputs, into=tmp_path / "c", **asked)
    keys = ["layer", "site", "grouping", "group"]
    by_hand = nerve.load_groups(tmp_path / "c").set_index(keys).sort_index()
    stored = groups[groups["step"] == 2].set_index(keys).sort_index()
    numbers = ["n_samples", "se", "pr", "eee", "variance"]
    assert stored.index.tolist() == by_hand.index.tolist()
    np.testing.assert_allclose(stored[numbers], by_hand[numbers], rtol=2e-5)


def test_groups_by_frequency_need_the_counts_of_the_data_module(tmp_path):
    with pytest.raises(MeasurementError, match="token_counts"):
        fit(tmp_path, make_module(), batches(1), batches(1), groups=["frequency"])


def test_without_the_shortcut_the_features_themselves_are_taken(tmp_path):
    values = {"every_n_steps": 2}
    _, short = fit(tmp_path / "s", make_module(), batches(2), batches(4), **values)
    _, long = fit(tmp_path / "l", make_module(), batches(2), batches(4), shortcut=False, **values)
    np.testing.assert_allclose(short.pr_pre, long.pr_pre, rtol=1e-6)
    np.testing.assert_allclose(short[METRICS], long[METRICS], rtol=1e-6, atol=1e-6)
    assert not np.array_equal(short.se_pre, long.se_pre)


def test_features_that_are_not_finite_are_null_with_a_status(tmp_path):
    class Poison(L.Callback):
        def on_validation_start(self, trainer, module):
            if trainer.global_step == 2:
                torch.nn.init.constant_(module.model.blocks[1].ffn.up.weight, float("inf"))

    with pytest.raises(DivergedError):
        fit(
            tmp_path,
            make_module(),
            batches(3),
            batches(2),
            callbacks=[Poison()],
            every_n_steps=1,
            spectra=True,
        )
    rows = nerve.load_metrics(tmp_path)
    broken = rows[(rows.step == 2) & (rows.layer == 1)].iloc[0]
    assert broken.status == "non_finite"
    assert np.isnan(broken.pr_post)
    spectra = nerve.load_spectra(tmp_path)
    assert len(spectra[(spectra.step == 1) & (spectra.layer == 1)]) == 2
    assert not len(spectra[(spectra.step == 2) & (spectra.layer == 1)])


def test_several_fits_in_one_process(tmp_path):
    first = fit(tmp_path / "a", make_module(), batches(3), batches(2), every_n_steps=1)[1]
    second = fit(tmp_path / "b", make_module(), batches(3), batches(2), every_n_steps=1)[1]
    pd.testing.assert_frame_equal(first, second)


def fit_again(callback, module, train, heldout, *, trainer=None, **options) -> L.Trainer:
    """Another fit with the same monitor, in a new trainer or continuing with one."""
    if trainer is None:
        trainer = L.Trainer(
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
    trainer.fit(module, Batches(train), Batches(heldout))
    return trainer


@pytest.mark.parametrize("step", [2, 3])
def test_a_fit_that_stops_early_and_resumes_leaves_the_rows_of_one_that_does_not(tmp_path, step):
    """At a step to measure, whose features come with the next batch, or in between, where the
    validation at the end of the fit is of no measured step."""

    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop |= trainer.global_step == step

    class InOrder:
        batch_size = 1

        def indices(self, i):
            return np.array([i])

    def part(name, callbacks=(), ckpt=None):
        module, train = Foreign(), batches(6)
        module.load_state_dict(weights)
        store = RunStore(tmp_path / name, "run")
        monitor = FitMonitor(store, every_n_steps=2, source="train", ffns=module.ffns())
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=6,
            callbacks=[monitor, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = BatchLoader(lambda rows: train[rows[0]], InOrder(), 6)
        trainer.fit(module, loader, Batches(batches(1, seed=1)), ckpt_path=ckpt)
        return trainer

    weights = Foreign().state_dict()
    for name in ("whole", "parts"):
        RunRecord.create(tmp_path / name, {}, run_id="run")
    part("whole")
    part("parts", [Stops()]).save_checkpoint(tmp_path / "stopped.ckpt")
    part("parts", ckpt=tmp_path / "stopped.ckpt")
    whole, parts = (nerve.load_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert whole.step.tolist() == [0, 2, 4]
    pd.testing.assert_frame_equal(parts, whole, check_exact=True)


def test_a_monitor_that_fits_again_starts_from_nothing(tmp_path):
    """Also after an exception in the middle of a measurement."""

    class Fails(LanguageModel):
        fails_at = 2

        def validation_step(self, batch, batch_idx):
            if self.trainer.global_step == self.fails_at and batch_idx == 1:
                raise RuntimeError("out of memory, say")
            return super().validation_step(batch, batch_idx)

    train, heldout = batches(4), batches(2, seed=1)
    expected = fit(tmp_path / "a", make_module(), train, heldout, every_n_steps=2)[1]
    module = make_module()
    module.__class__ = Fails
    store = RunStore(tmp_path / "b", RunRecord.create(tmp_path / "b", {}, run_id="run").run_id)
    callback = FitMonitor(store, every_n_steps=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit_again(callback, module, train, heldout, max_steps=4, max_epochs=-1)
    fit_again(callback, make_module(), train, heldout, max_steps=4, max_epochs=-1)
    pd.testing.assert_frame_equal(nerve.load_metrics(tmp_path / "b"), expected)


def test_a_trainer_that_goes_on_keeps_the_row_that_it_had_come_to(tmp_path):
    train, heldout = batches(4), batches(2, seed=1)
    store = RunStore(tmp_path, RunRecord.create(tmp_path, {}, run_id="run").run_id)
    callback, module = FitMonitor(store, every_n_steps=2), make_module()
    trainer = fit_again(callback, module, train, heldout, max_steps=4, max_epochs=-1)
    before = nerve.load_metrics(tmp_path)
    trainer.fit_loop.epoch_loop.max_steps = 8
    fit_again(callback, module, train, heldout, trainer=trainer)
    rows = nerve.load_metrics(tmp_path)
    pd.testing.assert_frame_equal(rows[: len(before)], before)
    assert rows["step"].tolist() == [step for step in (0, 2, 4, 6, 8) for _ in range(2)]
    assert rows["tokens_seen"].tolist() == (rows["step"] * BATCH * SEQ).tolist()


def test_the_last_step_of_a_number_of_epochs_is_measured(tmp_path):
    store = RunStore(tmp_path, RunRecord.create(tmp_path, {}, run_id="run").run_id)
    module = Foreign()
    callback = FitMonitor(store, every_n_steps=4, ffns=module.ffns())
    fit_again(callback, module, batches(5), batches(2, seed=1), max_epochs=2)
    assert sorted(set(nerve.load_metrics(tmp_path)["step"])) == [0, 4, 8, 10]


@pytest.mark.parametrize("source", ["heldout", "train"])
def test_epochs_that_end_within_a_window_of_accumulation_keep_to_the_cadence(tmp_path, source):
    """With 5 batches per epoch, the last batch is an update by itself: 3 updates per epoch."""
    store = RunStore(tmp_path, RunRecord.create(tmp_path, {}, run_id="run").run_id)
    module = Foreign()
    callback = FitMonitor(store, every_n_steps=2, ffns=module.ffns(), source=source)
    windows = {"max_epochs": 2, "accumulate_grad_batches": 2}
    fit_again(callback, module, batches(5), batches(1, seed=1), **windows)
    rows = nerve.load_metrics(tmp_path)
    assert rows["step"].tolist() == ([0, 2, 4, 6] if source == "heldout" else [0, 2, 4])
    if source == "train":
        assert (rows["n_samples"] // (BATCH * SEQ)).tolist() == [2, 1, 2]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_rows(tmp_path):
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 3:
                torch.nn.init.constant_(module.model.head.weight, float("inf"))

    with pytest.raises(DivergedError, match="at step 3"):
        fit(
            tmp_path,
            make_module(),
            batches(6),
            batches(2),
            callbacks=[Poison()],
            every_n_steps=1,
        )
    rows = nerve.load_metrics(tmp_path)
    assert sorted(rows.step.unique()) == [0, 1, 2, 3]
    assert (rows.status == "ok").all()


def test_an_ffn_that_runs_twice_in_a_training_step_is_refused(tmp_path):
    module = make_module()
    module.model.blocks.append(module.model.blocks[0])
    with pytest.raises(MeasurementError, match="it ran 2 times"):
        fit(tmp_path, module, batches(2), batches(1), every_n_steps=1, source="train")
    assert not module.model.blocks[0].ffn.up._forward_hooks


@pytest.mark.parametrize("n_runs", [1, None])
@pytest.mark.parametrize(
    ("source", "hook", "is_first"),
    [
        ("heldout", "on_validation_batch_start", False),
        ("heldout", "on_validation_batch_end", True),
        ("train", "on_train_batch_start", False),
        ("train", "on_before_backward", True),
    ],
)
def test_what_callbacks_run_around_a_step_is_no_part_of_it(
    tmp_path, source, hook, is_first, n_runs
):
    """Callbacks that come before the monitor or after it, between its hooks and the step."""
    module, callback = Foreign(), L.Callback()
    setattr(callback, hook, lambda *_: module.proj(torch.relu(module.fc(torch.rand(9, VOCAB)))))
    _, rows = fit(
        tmp_path,
        module,
        batches(2),
        batches(1, seed=1),
        every_n_steps=1,
        source=source,
        ffns=[replace(ffn, n_runs=n_runs) for ffn in module.ffns()],
        **{"before" if is_first else "callbacks": [callback]},
    )
    assert (rows.n_samples == BATCH * SEQ).all()
    assert (rows.status == "ok").all()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_training_step_that_is_skipped_before_the_model_runs_is_named(tmp_path):
    module = make_module()
    module.training_step = lambda batch, batch_idx: None
    with pytest.raises(MeasurementError, match=r"it ran 0 times.*training_step that returns None"):
        fit(tmp_path, module, batches(2), batches(1), every_n_steps=1, source="train")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be null or a whole number of at least 1; got 0"),
        (
            {"every_n_steps": None},
            "^every_n_steps or steps must be set.* null for both",
        ),
        ({"steps": []}, r"must be a list of optimizer steps.* as in \[0,1,2,4,8\]; got \[\]"),
        ({"steps": [1, -2]}, r"whole numbers from 0.*got \[1, -2\]"),
        ({"steps": "log"}, "a spacing such as log:30 .*got 'log'"),
        ({"steps": "log:1"}, "a spacing such as log:30 .*got 'log:1'"),
        ({"source": "held_out"}, "^source must be one of heldout, train; got 'held_out'"),
        ({"layers": "all"}, "^layers must be a list or null; got 'all'"),
        ({"shortcut": 1}, "^shortcut must be true or false or a string; got 1"),
        ({"shortcut": "exact"}, "shortcut must be true, false or projected; got 'exact'"),
        ({"layers": [0], "ffns": []}, "layers must be None; got both"),
        ({"spectra": "yes"}, "^spectra must be true, false or auto; got 'yes'"),
        ({"every_n_step": 2}, "^an argument must be one of .*Did you mean 'every_n_steps'"),
        ({"skip_first": -1}, "^skip_first must be a whole number of at least 0; got -1"),
        ({"mask": 1}, "mask must be a function of a batch; got int 1"),
    ],
)
def test_bad_values_are_refused_before_training(tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        FitMonitor(RunStore(tmp_path, "run"), **values)


class Recorder(Logger):
    """Keeps the logged values, and the training step at which each measurement was logged."""

    name, version = "recorder", ""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.measured: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        measured = any("/" in name for name in metrics)
        (self.measured if measured else self.logged).append((step, dict(metrics)))


class Watch(L.Callback):
    """The values that callbacks can monitor at the end of validation, by step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.seen[trainer.global_step] = numbers


def by_step(rows, values_of) -> dict[int, dict[str, float]]:
    return {step: values_of(part.to_dict("records")) for step, part in rows.groupby("step")}


@pytest.mark.parametrize("source", ["heldout", "train"])
def test_loggers_get_each_measurement_with_its_step_and_the_store_has_it_once(tmp_path, source):
    recorder = Recorder()
    values = {"every_n_steps": 2, "source": source}
    data = batches(5), batches(2, seed=1)
    _, rows = fit(tmp_path, make_module(), *data, loggers=[recorder], **values)
    expected = by_step(rows, logged_values)
    assert dict(recorder.measured) == expected
    assert [step for step, _ in recorder.measured] == sorted(expected)
    assert {"ffn/00/pr_post", "ffn/01/pr_post", "ffn/mean/pr_post"} <= expected[2].keys()
    # What Lightning itself logs is as it would be without the measurements.
    assert set(nerve.load_scalars(tmp_path).name) == {"train_loss", "val_loss"}
    assert {name for _, values in recorder.logged for name in values} == {
        *("train_loss", "val_loss", "epoch")
    }


@pytest.mark.parametrize("source", ["heldout", "train"])
def test_callbacks_can_monitor_layers_and_their_means(tmp_path, source):
    """They are those of the same step, or with training data those of the previous one."""
    watch = Watch()
    values = {"every_n_steps": 2, "source": source}
    data = batches(6), batches(2, seed=1)
    _, rows = fit(tmp_path, make_module(), *data, callbacks=[watch], **values)
    values_of = by_step(rows, monitored_values)
    assert list(watch.seen) == [2, 4, 6]
    for step, seen in watch.seen.items():
        there = values_of[step if source == "heldout" else step - 2]
        assert {"pr_post", "ffn/mean/pr_post", "ffn/00/pr_post", "ffn/01/js"} <= there.keys()
        assert {name: seen[name] for name in there} == pytest.approx(there, rel=1e-6)


def test_measurements_that_are_solved_late_keep_their_step_and_their_order(tmp_path, monkeypatch):
    """Solving takes longer than training from one measurement to the next."""
    solve = FFNEigenproblem.solve

    def late(problem):
        time.sleep(0.1)
        return solve(problem)

    monkeypatch.setattr(FFNEigenproblem, "solve", late)
    monkeypatch.setattr("nerve.recording.pipeline.spare_workers", lambda *args: 1)
    recorder, watch = Recorder(), Watch()
    data = batches(6), batches(1, seed=1)
    extra = {"loggers": [recorder], "callbacks": [watch]}
    _, rows = fit(tmp_path, make_module(), *data, every_n_steps=1, **extra)
    assert recorder.measured == list(by_step(rows, logged_values).items())
    means = {step: means["pr_post"] for step, means in by_step(rows, mean_values).items()}
    lags = []
    there = {step: seen["pr_post"] for step, seen in watch.seen.items() if "pr_post" in seen}
    for step, seen_mean in there.items():
        lags += [lag for lag in range(6) if means.get(step - lag) == pytest.approx(seen_mean)]
    assert len(lags) == len(there) > 0
    assert 1 <= max(lags) <= MOST_PENDING  # else nothing was late


def test_the_first_measurement_is_waited_for_where_a_callback_monitors_it(tmp_path, monkeypatch):
    """Lightning raises an error if a callback monitors a value that does not exist."""
    solve, began = FFNEigenproblem.solve, threading.Event()

    def late(problem):
        assert began.wait(100)
        return solve(problem)

    monkeypatch.setattr(FFNEigenproblem, "solve", late)
    monkeypatch.setattr("nerve.recording.pipeline.spare_workers", lambda *args: 1)
    monitored = "nerve.training.fit.is_awaited"
    ask = fit_module.is_awaited
    monkeypatch.setattr(monitored, lambda trainer: (began.set(), ask(trainer))[1])
    stop, watch = EarlyStopping("ffn/mean/pr_post", patience=9), Watch()
    data = batches(2), batches(1, seed=1)
    fit(tmp_path, make_module(), *data, every_n_steps=1, callbacks=[stop, watch])
    assert list(watch.seen) == [1, 2]
    assert all(np.isfinite(seen["pr_post"]) for seen in watch.seen.values())


@pytest.mark.parametrize("monitor", ["pr_post", "ffn/mean/se_pre", "ffn/01/js", "val_loss"])
def test_training_can_be_stopped_early_by_what_was_measured(tmp_path, monitor):
    stop = EarlyStopping(monitor, mode="min", patience=0, min_delta=1e9)
    data = batches(9), batches(2, seed=1)
    _, rows = fit(tmp_path, make_module(), *data, callbacks=[stop], every_n_steps=2)
    assert (stop.stopped_epoch, rows.step.max()) == (0, 4)  # 4 is not better than 2 by so much
    column, measured = monitor.rpartition("/")[2], rows[rows.step == 2]
    if "/01/" in monitor:
        measured = measured[measured.layer == 1]
    assert float(stop.best_score) == pytest.approx(measured[column].mean(), rel=1e-6)


def test_a_mean_of_nothing_is_nan_for_callbacks_and_left_out_of_logs(tmp_path):
    """No layer can be measured, because the FFNs' inputs are 0."""
    module, recorder, watch = make_module(activation={"name": "relu"}), Recorder(), Watch()
    for block in module.model.blocks:
        torch.nn.init.zeros_(block.ffn.up.weight)
        block.ffn.up.requires_grad_(False)
    extra = {"loggers": [recorder], "callbacks": [watch]}
    fit(tmp_path, module, batches(2), batches(1), every_n_steps=2, **extra)
    assert np.isnan(watch.seen[2]["pr_post"])
    assert recorder.logged
    assert all("train_loss" in values or "val_loss" in values for _, values in recorder.logged)
    assert not recorder.measured


class Resumable(Batches):
    """Avoids Lightning's warning about a loader that cannot be resumed; the batches do not matter
    here."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class SaveAt(L.Callback):
    """Saves a checkpoint at a step, like a user's code."""

    def __init__(self, path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("every_n_steps", "n_steps", "steps"),
    [(2, 4, [0, 1, 2, 4]), (1, 3, [0, 1, 2, 3]), (100, 5, [0, 1, 2, 5])],
)
def test_who_resumes_leaves_no_rows_of_the_branch_that_it_abandons(
    tmp_path, every_n_steps, n_steps, steps
):
    """With another cadence and fewer steps, rows after the checkpoint would not be replaced. With a
    user's trainer, without any other part of nerve."""
    RunRecord.create(tmp_path, {}, run_id="run")

    def fit_piece(every: int, n: int, callbacks=(), ckpt_path=None) -> None:
        store = RunStore(tmp_path, "run")
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=n,
            max_epochs=-1,
            callbacks=[FitMonitor(store, every_n_steps=every), *callbacks],
            logger=[StoreLogger(store)],
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        heldout = Batches(batches(1, seed=1))
        trainer.fit(make_module(), Resumable(batches(6)), heldout, ckpt_path=ckpt_path)
        store.flush(trainer.global_step)

    fit_piece(1, 6, [SaveAt(tmp_path / "own.ckpt", 2)])
    assert sorted(nerve.load_metrics(tmp_path).step.unique()) == [0, 1, 2, 3, 4, 5, 6]
    fit_piece(every_n_steps, n_steps, ckpt_path=tmp_path / "own.ckpt")
    assert sorted(nerve.load_metrics(tmp_path).step.unique()) == steps
    assert nerve.load_spectra(tmp_path).step.max() == n_steps
    assert nerve.load_scalars(tmp_path).step.max() <= n_steps
    fit_piece(4, 4)
    assert sorted(nerve.load_metrics(tmp_path).step.unique()) == [0, 4]


class Poison(L.Callback):
    """Makes the loss infinite at step 2."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2:
            torch.nn.init.constant_(module.model.head.weight, float("inf"))


@pytest.mark.parametrize("what", ["drain", "abort", "close"])
def test_the_error_that_ends_a_run_is_not_replaced_by_what_the_ending_raises(
    tmp_path, monkeypatch, what
):
    """And hooks are removed and threads end, whatever is raised in the process."""
    whole = getattr(spectra_recorder.Recorder, what)

    def refuse(recorder, **given):
        if what == "close":
            whole(recorder, **given)
        raise MeasurementError("the disk is full, say")

    monkeypatch.setattr(spectra_recorder.Recorder, what, refuse)
    module = make_module()
    with pytest.raises(DivergedError, match="at step 2") as ended:
        fit(tmp_path, module, batches(4), batches(1), callbacks=[Poison()], every_n_steps=9)
    assert any("the disk is full" in note for note in ended.value.__notes__)
    assert not module.model.blocks[0].ffn.up._forward_hooks


@pytest.mark.parametrize("raises", [False, True])
def test_a_monitor_keeps_no_model_once_the_fit_is_over(tmp_path, raises):
    """Nor does what notes the step: Lightning sets log methods of the module on callbacks."""
    record = RunRecord.create(tmp_path, {})
    monitor = FitMonitor(RunStore(tmp_path, record.run_id), every_n_steps=1)
    module, notes = make_module(), StepNotes(Heartbeat(record))
    seen = weakref.ref(module.model)

    def train(module: L.LightningModule) -> None:
        callbacks = [monitor, notes, *([Poison()] if raises else [])]
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=4,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Batches(batches(4)), Batches(batches(1, seed=1)))

    with pytest.raises(DivergedError) if raises else nullcontext():
        train(module)
    del module
    gc.collect()
    assert seen() is None
    assert monitor.latest
