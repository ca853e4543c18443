"""A plain loop that is watched leaves the rows of the Lightning monitor, also after a kill."""

import copy
import gc
import io
import os
import shutil
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch
from processes import ended, start, together
from support import Batches
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import nerve
from nerve.errors import ConfigError, MeasurementError, StoreError
from nerve.integrations import features
from nerve.measuring.arguments import batch_of
from nerve.measuring.tap import Hook

N_STEPS = 7


class Net(nn.Module):
    """Two residual FFNs with dropout, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4)) for _ in range(2)
        )
        self.drop = nn.Dropout(0.1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + self.drop(block(x))
        return x


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def ffns(model: Net) -> list[nerve.FFNAdapter]:
    return [nerve.FFNAdapter(i, "ffn", b[0], b[2]) for i, b in enumerate(model.blocks)]


def pairs(n: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, 2, 32, 4, generator=generator, dtype=torch.float64)
    return [(x, y) for x, y in values]


def mean_loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> dict:
    inputs, targets = pair
    loss = (model(inputs) - targets).square().mean()
    return {"loss": loss, "n_targets": targets.numel()}


class Training(L.LightningModule):
    def __init__(self, model: Net) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return mean_loss(self.model, batch)

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def in_lightning(
    directory: Path, model: Net, *, accumulate: int = 1, source: str, **asked
) -> pd.DataFrame:
    monitor = nerve.SpectralMonitor(directory, every_n_steps=3, source=source, **asked)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=N_STEPS,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(1)
    trainer.fit(Training(model), Batches(pairs(N_STEPS * accumulate)), Batches(pairs(2, seed=9)))
    return nerve.load_metrics(directory)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(
    directory: Path,
    model: nn.Module,
    *,
    accumulate: int = 1,
    source: str = "train",
    checkpoint: dict | None = None,
    save_at: int | None = None,
    within: Callable[[int], None] = lambda step: None,
    share: slice = slice(None),
    **more,
) -> dict:
    """Trains to step 7, possibly from a checkpoint; returns the one of step `save_at`.

    Args:
        within: is called in each step between its backward pass and the optimizer, with the number
            of steps before it.
        share: of each batch the part that this process has.
    """
    optimizer, data = optimizer_of(model), pairs(N_STEPS * accumulate)
    heldout = {"heldout": pairs(2, seed=9), "forward": mean_loss} if source == "heldout" else {}
    kept: dict = checkpoint if checkpoint is not None else {}
    if "model" in kept:
        model.load_state_dict(kept["model"])
    first = kept["n_steps"] if kept else 0
    torch.manual_seed(1 + first)
    with nerve.watch(
        model,
        directory,
        **{"every_n_steps": 3, "optimizer": optimizer, "config": {"seed": 5}, **heldout, **more},
        resume=kept.get("watch"),
    ) as run:
        for step in range(first, N_STEPS):
            total = torch.zeros(())
            for x, y in data[step * accumulate : (step + 1) * accumulate]:
                loss = mean_loss(model, (x[share], y[share]))["loss"] / accumulate
                loss.backward()
                total = total + loss.detach()
            within(step)
            optimizer.step()
            optimizer.zero_grad()
            run.step(total, y[share].numel() * accumulate)
            if run.n_steps == save_at:
                kept = {
                    "model": {k: v.clone() for k, v in model.state_dict().items()},
                    "watch": run.state_dict(),
                    "n_steps": save_at,
                }
                torch.save(kept, directory / "checkpoint.pt")
                torch.manual_seed(1 + save_at)
    return kept


def assert_same(rows: pd.DataFrame, other: pd.DataFrame, leaving: tuple[str, ...] = ()) -> None:
    """All columns except those that describe the run, to 1e-12."""
    rows, other = (each.drop(columns=["run_id", "run_status", *leaving]) for each in (rows, other))
    pd.testing.assert_frame_equal(rows, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("source", ["train", "heldout"])
def test_the_rows_are_those_of_the_lightning_monitor(tmp_path, accumulate, source):
    """Also over micro-batches, whose dropout shows that measuring draws no random numbers."""
    model = network()
    how = {"accumulate": accumulate, "source": source, "ffns": ffns(model)}
    expected = in_lightning(tmp_path / "lightning", model, **how)
    train(tmp_path / "loop", network(), accumulate=accumulate, source=source)
    rows = nerve.load_metrics(tmp_path / "loop")
    steps = [0, 3, 6] if source == "train" else [0, 3, 6, 7]
    assert sorted(set(rows["step"])) == steps
    assert (rows["status"] == "ok").all()
    # Lightning validates for its labels whatever the source is.
    assert_same(rows, expected, leaving=("val_loss",) if source == "train" else ())


@pytest.mark.parametrize("source", ["train", "heldout"])
def test_watching_changes_no_weights_and_leaves_no_hooks(tmp_path, source):
    watched, alone = network(), network()
    train(tmp_path, watched, source=source)
    torch.manual_seed(1)
    optimizer = optimizer_of(alone)
    for pair in pairs(N_STEPS):
        mean_loss(alone, pair)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    for module in watched.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert watched.training


def test_a_loop_in_16_bits_may_project_pre(tmp_path):
    """Also with groups, and with the input as a site."""
    model = network().float()
    ways = {"shortcut": "projected", "groups": ["halves"], "sites": ["input"]}
    with nerve.watch(model, tmp_path, every_n_steps=1, **ways) as run:
        for x, y in pairs(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = mean_loss(model, (x.float().view(4, 8, 4), y.float().view(4, 8, 4)))["loss"]
            loss.backward()
            run.step(loss, y.numel())
    assert set(nerve.load_metrics(tmp_path)["precision"]) == {"projected_bfloat16"}
    groups = nerve.load_groups(tmp_path).groupby(["site", "grouping"])["dim"].agg(["size", "max"])
    of_step = {("pre", "halves"): 4, ("post", "halves"): 4, ("input", "all"): 2}
    assert {key: groups.loc[key, "size"] / 2 for key in of_step} == of_step
    assert groups["max"].groupby("site").max().to_dict() == {"input": 4, "post": 12, "pre": 12}


def test_the_run_is_loaded_like_any_other(tmp_path):
    train(tmp_path, network(), source="heldout", config={"seed": 5, "design": "plain"})
    runs = nerve.load_runs(tmp_path)
    (run,) = runs.to_dict("records")
    assert (run["run_status"], run["seed"], run["design"]) == ("done", 5, "plain")
    assert (run["step"], run["monitor.source"]) == (N_STEPS, "heldout")
    assert run["n_parameters"] == sum(p.numel() for p in network().parameters())
    spectra = nerve.load_spectra(tmp_path)
    assert len(spectra) == 4 * 2 * 2  # steps, layers, sites
    rows = nerve.load_metrics(tmp_path, factors=["design"])
    assert set(rows["design"]) == {"plain"}


def raising(error: BaseException) -> Callable[[int], None]:
    def within(step: int) -> None:
        if step == 6:
            raise error

    return within


@pytest.mark.parametrize("source", ["train", "heldout"])
@pytest.mark.parametrize("save_at", [3, 5])
@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("no"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_loop_that_raised_is_resumed_as_if_uninterrupted(
    tmp_path, source, save_at, error, status
):
    """From a measured step, before its features are there, and from one between two of them."""
    train(tmp_path / "whole", network(), source=source, save_at=save_at)
    model, cut = network(), tmp_path / "cut"
    with pytest.raises(type(error)):
        train(cut, model, source=source, save_at=save_at, within=raising(error))
    record = nerve.RunRecord.load(cut)
    assert (record.run_status, record.error and record.error["type"]) == (
        status,
        type(error).__name__,
    )
    # Everything that was measured is there, also what was measured when it raised.
    assert sorted(set(nerve.load_metrics(cut)["step"])) == (
        [0, 3] if source == "train" else [0, 3, 6]
    )
    assert not any(module._forward_hooks for module in model.modules())
    checkpoint = torch.load(cut / "checkpoint.pt")
    train(cut, network(), source=source, checkpoint=checkpoint)
    again = nerve.RunRecord.load(cut)
    assert (again.run_status, again.restarts, again.run_id) == ("done", 1, record.run_id)
    assert_same(nerve.load_metrics(cut), nerve.load_metrics(tmp_path / "whole"))


def test_the_error_of_a_loop_is_not_replaced_by_one_at_its_end(tmp_path, monkeypatch):
    """A full disk prevents writing rows, but not the record of how the run ended."""

    def full(store, step):
        raise StoreError("the disk is full")

    def within(step: int) -> None:
        if step == 6:
            monkeypatch.setattr(nerve.RunStore, "flush", full)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no") as raised:
        train(tmp_path, network(), within=within)
    assert raised.value.__notes__ == ["Then, as the run ended: StoreError: the disk is full"]
    record = nerve.RunRecord.load(tmp_path)
    assert (record.run_status, record.error and record.error["type"]) == ("failed", "ValueError")


@pytest.mark.parametrize("source", ["train", "heldout"])
def test_a_loop_that_has_ended_keeps_no_model(tmp_path, source):
    """Even if the variables of the block still exist, as in a notebook."""
    model = network()
    seen, heldout = weakref.ref(model), {"heldout": [pairs(1)[0][0]]} if source == "heldout" else {}
    with nerve.watch(model, tmp_path, optimizer=optimizer_of(model), **heldout) as run:
        mean_loss(model, pairs(1)[0])["loss"].backward()
        run.step()
    del model
    gc.collect()
    assert seen() is None
    assert run.latest
    with pytest.raises(ConfigError, match="after its end, at step 1"):
        run.step()


def killed(directory: str) -> None:
    """Saves at step 4, and is killed during the step after the sixth."""

    def within(step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    train(Path(directory), network(), source="heldout", save_at=4, within=within)


def test_a_killed_loop_keeps_its_rows_and_is_resumed(tmp_path):
    train(tmp_path / "whole", network(), source="heldout", save_at=4)
    whole, cut = nerve.load_metrics(tmp_path / "whole"), tmp_path / "cut"
    cut.mkdir()
    process = start(killed, str(cut), cwd=tmp_path, log=tmp_path / "log")
    assert ended(process) == -signal.SIGKILL
    assert nerve.RunRecord.load(cut).run_status == "running"
    assert sorted(set(nerve.load_metrics(cut)["step"])) == [0, 3, 6]
    checkpoint = torch.load(cut / "checkpoint.pt")
    train(cut, network(), source="heldout", checkpoint=checkpoint)
    assert_same(nerve.load_metrics(cut), whole)


def test_without_a_checkpoint_a_run_is_not_started_over(tmp_path):
    """Whether it has failed after its first measurement or is done."""
    with pytest.raises(ValueError, match="no"):
        train(tmp_path, network(), within=raising(ValueError("no")))
    with pytest.raises(
        StoreError, match=r"failed, with 2 measured steps\. .*resume= and the state"
    ):
        train(tmp_path, network())
    assert sorted(set(nerve.load_metrics(tmp_path)["step"])) == [0, 3]
    train(tmp_path / "whole", network())
    with pytest.raises(StoreError, match=r"is done, .*another directory"):
        train(tmp_path / "whole", network())
    with pytest.raises(StoreError, match=r"every_n_steps.*\. Choose another directory, or delete"):
        train(tmp_path / "whole", network(), every_n_steps=2)


def test_a_run_that_goes_on_has_no_final_values_until_it_ends(tmp_path):
    """Those of the end that it has abandoned are not its own."""
    kept = train(tmp_path, network(), source="heldout", save_at=4)
    assert nerve.RunRecord.load(tmp_path).final.keys() == {"val_loss", "measuring_seconds"}
    seen = []

    def within(step: int) -> None:
        seen.append(nerve.RunRecord.load(tmp_path))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        train(tmp_path, network(), source="heldout", checkpoint=kept, within=within)
    seen.append(nerve.RunRecord.load(tmp_path))
    found = [(record.run_status, record.step, record.final) for record in seen]
    assert found == [("running", 4, {}), ("failed", 4, {})]


def in_processes(rank: int, directory: str) -> None:
    """Each has half of every batch, and one of the two held-out batches."""
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    half = slice(16 * rank, 16 * (rank + 1))
    for source in ("train", "heldout"):
        model = DistributedDataParallel(without_dropout())
        own = {"heldout": pairs(2, seed=9)[rank : rank + 1]} if source == "heldout" else {}
        train(Path(directory, source), model, source=source, share=half, **own)
    # A thread of gloo that still frees a tensor needs the interpreter, which whoever ends it holds.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def without_dropout() -> Net:
    model = network()
    model.drop = nn.Dropout(0.0)
    return model


def test_two_processes_leave_the_rows_of_one(tmp_path):
    """Up to rounding, since sums are over halves."""
    together(in_processes, 2, tmp_path)
    for source in ("train", "heldout"):
        train(tmp_path / "one", without_dropout(), source=source, config={"source": source})
        one, two = nerve.load_metrics(tmp_path / "one"), nerve.load_metrics(tmp_path / source)
        assert one["n_samples"].tolist() == two["n_samples"].tolist()
        pd.testing.assert_frame_equal(
            one.drop(columns="run_id"), two.drop(columns="run_id"), rtol=1e-9, atol=1e-12
        )
        shutil.rmtree(tmp_path / "one")


class Masked(nn.Module):
    """Takes tokens and their mask by keyword, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.ffn = (
            nn.Embedding(9, 4),
            nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4)),
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        y = self.ffn(self.embed(input_ids)) * attention_mask[..., None]
        return {"loss": y.square().mean()}


@pytest.mark.parametrize("is_heldout", [False, True])
def test_padding_does_not_count(tmp_path, is_heldout):
    torch.manual_seed(0)
    model = Masked()
    mask = (torch.arange(8) < torch.tensor([[8], [3], [5]])).long()
    batch = {"input_ids": torch.randint(9, (3, 8)), "attention_mask": mask}
    expected = nerve.measure(model, [batch], skip_first=1)
    given = {"heldout": [batch]} if is_heldout else {}
    with nerve.watch(model, tmp_path, skip_first=1, **given) as run:
        model(**batch)["loss"].backward()
        run.step()
    rows = nerve.load_metrics(tmp_path)
    rows = rows[rows["step"] == 0]
    assert rows["n_samples"].tolist() == expected["n_samples"].tolist() == [13]
    assert rows["pr_post"].tolist() == pytest.approx(expected["pr_post"].tolist(), rel=1e-12)
    assert rows["train_loss"].isna().all()
    assert rows["val_loss"].notna().all() == is_heldout


def test_neither_padding_nor_recomputed_features_count_in_any_micro_batch(tmp_path):
    """The model runs once more to see which tokens an FFN has, and parts of it in the backward
    pass; the mask is found among arguments by position and by name."""
    torch.manual_seed(0)
    model = Masked()
    described = [nerve.FFNAdapter(0, "ffn", model.ffn[0], model.ffn[2])]
    model.ffn.forward = partial(checkpoint, model.ffn.forward, use_reentrant=False)
    masks = [(torch.arange(8) < torch.tensor(n)[:, None]).long() for n in ([8, 3], [5, 7])]
    batches = [{"input_ids": torch.randint(9, (2, 8)), "attention_mask": mask} for mask in masks]
    expected = nerve.measure(model, batches, ffns=described)
    with nerve.watch(model, tmp_path, ffns=described) as run:
        for batch in batches:
            model(batch["input_ids"], attention_mask=batch["attention_mask"])["loss"].backward()
        run.step()
    rows = nerve.load_metrics(tmp_path)
    assert rows["n_samples"].tolist() == expected["n_samples"].tolist() == [23]
    assert rows["pr_post"].tolist() == pytest.approx(expected["pr_post"].tolist(), rel=1e-6)


class PassingOn(nn.Module):
    """Calls a module with whatever it gets, as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: object, **others: object) -> object:
        return self.module(*inputs, **others)


@pytest.mark.parametrize(
    "wrap",
    [
        partial(torch.compile, backend="aot_eager"),
        PassingOn,
        lambda model: PassingOn(PassingOn(model)),
    ],
    ids=["compiled", "passed on", "passed on twice"],
)
def test_arguments_have_the_names_of_the_module_that_takes_them(tmp_path, wrap):
    """Tokens by position, their mask by name: padding does not count."""
    torch.manual_seed(0)
    model, mask = Masked(), (torch.arange(8) < torch.tensor([[8], [3], [5]])).long()
    ids = torch.randint(9, (3, 8))
    expected = nerve.measure(model, [{"input_ids": ids, "attention_mask": mask}])
    wrapped, described = wrap(model), [nerve.FFNAdapter(0, "ffn", model.ffn[0], model.ffn[2])]
    with nerve.watch(wrapped, tmp_path, ffns=described) as run:
        wrapped(ids, attention_mask=mask)["loss"].backward()
        run.step()
    rows = nerve.load_metrics(tmp_path)
    assert rows["n_samples"].tolist() == expected["n_samples"].tolist() == [16]
    assert rows["pr_post"].tolist() == pytest.approx(expected["pr_post"].tolist(), rel=1e-6)


@pytest.mark.parametrize("wrap", [lambda model: model, PassingOn])
@pytest.mark.parametrize("is_given", [False, True])
def test_a_mask_by_position_is_known_by_its_name(tmp_path, wrap, is_given):
    """A mask function of the caller gets the tuple of positional arguments."""
    torch.manual_seed(0)
    model, mask = Masked(), (torch.arange(8) < torch.tensor([[8], [3], [5]])).long()
    wrapped, described = wrap(model), [nerve.FFNAdapter(0, "ffn", model.ffn[0], model.ffn[2])]
    given = {"mask": lambda batch: batch[1]} if is_given else {}
    with nerve.watch(wrapped, tmp_path, ffns=described, **given) as run:
        wrapped(torch.randint(9, (3, 8)), mask)["loss"].backward()
        run.step()
    assert nerve.load_metrics(tmp_path)["n_samples"].tolist() == [16]


def test_arguments_by_position_that_name_no_tokens_stay_a_tuple():
    x, y = torch.zeros(2, 3), torch.ones(2, 3)

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
            return x

    assert batch_of(Two(), (x, y, x), {}, by_name=True) == (x, y, x)


def test_a_wrapper_may_pass_on_something_else():
    class Counting(PassingOn):
        def forward(self, *inputs: object, **others: object) -> object:
            return self.module(inputs[0])

    ids, mask = torch.zeros(2, 3), torch.ones(2, 3)
    given = (ids, 5, 7), {"attention_mask": mask}
    batch = batch_of(Counting(nn.Linear(3, 3)), *given)
    assert batch == {"inputs": (ids, 5, 7), "attention_mask": mask}


def test_further_arguments_by_name_are_entries_of_the_batch():
    class Open(Masked):
        def forward(self, input_ids: Tensor, **others: Tensor) -> Tensor:
            return input_ids

    ids, mask = torch.zeros(2, 3), torch.ones(2, 3)
    for module in (Open(), PassingOn(Open())):
        batch = batch_of(module, (ids,), {"attention_mask": mask})
        assert batch.keys() == {"input_ids", "attention_mask"}
        assert batch["attention_mask"] is mask


@pytest.mark.parametrize("source", ["train", "heldout"])
def test_what_hooks_change_counts_whenever_they_were_registered(tmp_path, source):
    """As of an ablation that begins in the middle of training, and of one of a site around."""

    def register(model: Net) -> None:
        up, _, down = model.blocks[1]
        up.register_forward_hook(lambda module, args, output: output * torch.linspace(0, 1, 12))
        down.register_forward_pre_hook(lambda module, args: (args[0] * torch.linspace(1, 2, 12),))
        down.register_forward_hook(lambda module, args, output: output * torch.linspace(1, 3, 4))

    x, rows, around = in_sequences(), [], []
    for first in (True, False):
        model = network()
        model.drop.p = 0.0
        how = {"ffns": ffns(model), "every_n_steps": 1, "sites": ["output"]}
        how |= {"heldout": [x]} if source == "heldout" else {}
        if first:
            register(model)
        directory = tmp_path / str(first)
        with nerve.watch(model, directory, **how) as run:
            if not first:
                register(model)
            for _ in range(2):
                model(x).sum().backward()
                run.step()
        rows.append(nerve.load_metrics(directory).query("step == 1"))
        around.append(nerve.load_groups(directory).query("step == 1 and site == 'output'"))
    assert_same(*rows)
    assert_same(*around)


def test_a_compiled_model_must_be_watched_itself(tmp_path):
    """The loop calls it, so it determines where a pass begins; the rows are those of the eager
    model, also if the model was compiled in place."""
    train(tmp_path / "eager", without_dropout())
    train(tmp_path / "compiled", torch.compile(without_dropout(), backend="aot_eager"))
    in_place = without_dropout()
    in_place.compile(backend="aot_eager")
    train(tmp_path / "in place", in_place)
    eager = nerve.load_metrics(tmp_path / "eager")
    for name in ("compiled", "in place"):
        assert_same(nerve.load_metrics(tmp_path / name), eager)


def test_missing_features_are_an_error(tmp_path):
    """The loop calls a module other than the watched one."""
    model, inputs = network(), pairs(1)[0][0]

    def loop() -> None:
        with nerve.watch(model, tmp_path, ffns=ffns(model)) as run:
            model.eval()(inputs)
            run.step()

    with pytest.raises(MeasurementError, match=r"step 0 .*that the loop calls"):
        loop()
    assert nerve.RunRecord.load(tmp_path).run_status == "failed"


@pytest.mark.parametrize("tries_again", [True, False])
def test_a_pass_that_raised_is_not_partly_counted(tmp_path, tries_again):
    """The loop continues, as some do after running out of memory; all runs of an FFN are pooled."""
    model, x = network(), pairs(1)[0][0]
    pooled = [
        nerve.FFNAdapter(i, "ffn", b[0], b[2], n_runs=None) for i, b in enumerate(model.blocks)
    ]
    model.drop.register_forward_pre_hook(raising_once(MemoryError("none left")))

    def loop() -> None:
        with nerve.watch(model, tmp_path, ffns=pooled) as run:
            with pytest.raises(MemoryError):
                model(x)
            if tries_again:
                model(x)
            run.step()

    with pytest.raises(MeasurementError, match="must complete; the last one raised"):
        loop()


@pytest.mark.parametrize("how", ["LBFGS", "forgets step"])
def test_features_of_different_weights_are_not_pooled(tmp_path, how):
    """As with an optimizer that runs the model several times, or a loop that calls step rarely."""
    model, batches = network(), pairs(3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = mean_loss(model, batches[0])["loss"]
        loss.backward()
        return loss

    if how == "LBFGS":
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loop() -> None:
        with nerve.watch(model, tmp_path, ffns=ffns(model)) as run:
            for _ in batches:
                optimizer.step(closure)
            run.step()

    with pytest.raises(
        MeasurementError, match=r"between two passes of step 0\. Call step after each"
    ):
        loop()


def test_equal_weights_in_other_tensors_are_pooled(tmp_path):
    """A functional call may be given a new copy for each micro-batch."""
    rows = []
    for name in ("own", "copies"):
        model, (batch, _) = network(), pairs(2)
        model.drop.p = 0.0
        with nerve.watch(model, tmp_path / name, ffns=ffns(model)) as run:
            for x in batch:
                copies = {key: each.clone() for key, each in model.named_parameters()}
                functional_call(model, copies if name == "copies" else {}, x)
            run.step()
        rows.append(nerve.load_metrics(tmp_path / name)[["n_samples", "pr_pre", "pr_post"]])
    pd.testing.assert_frame_equal(*rows)


def accumulate_sharded(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = network()
    described = ffns(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nerve.watch(model, Path(folder, "run"), ffns=described, every_n_steps=1) as run:
        for _ in range(2):
            for inputs, targets in pairs(2):  # sequences: for a matrix, the tensors stay the same
                mean_loss(model, (inputs[None], targets[None]))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # FSDP keeps gloo's threads, with which an interpreter may abort at its end


def test_micro_batches_of_sharded_weights_are_pooled(tmp_path):
    """FSDP leaves gathered weights in the model after a forward pass, and shards after backward."""
    together(accumulate_sharded, 2, tmp_path)
    rows = nerve.load_metrics(tmp_path / "run")
    assert set(rows["step"]) == {0, 1}
    assert set(rows["status"]) == {"ok"}


@pytest.mark.parametrize("source", ["train", "heldout"])
def test_backward_hooks_see_the_derivatives_of_the_loop_only(tmp_path, source):
    """A measurement takes others, to find FFNs and to check what follows pre."""
    model, calls = network(), []
    for module in model.modules():
        module.register_full_backward_hook(lambda *given: calls.append("backward"))
        module.register_full_backward_pre_hook(lambda *given: calls.append("before"))
    inputs = pairs(1)[0][0].requires_grad_()
    mean_loss(model, (inputs, inputs.detach()))["loss"].backward()
    of_one_step = calls.copy()
    calls.clear()
    heldout = None if source == "train" else [inputs.detach()]
    with nerve.watch(model, tmp_path, every_n_steps=1, heldout=heldout) as run:
        mean_loss(model, (inputs, inputs.detach()))["loss"].backward()
        run.step()
    nerve.measure(model, [inputs.detach()])
    assert calls == of_one_step
    assert {len(each._backward_hooks) for each in model.modules()} == {1}


def in_sequences(seed: int = 0) -> Tensor:
    """`[sequence, position, width]`: shortened copies of such batches show which tokens the FFNs
    have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 8, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("n_runs", [1, None])
def test_two_watches_of_one_model_at_once_leave_equal_rows(tmp_path, n_runs):
    """Each runs the model, shortened, to see which tokens its FFNs have, while the other one has
    begun to take the same pass."""
    model = network()
    described = [
        nerve.FFNAdapter(i, "ffn", b[0], b[2], n_runs=n_runs) for i, b in enumerate(model.blocks)
    ]
    how = {"ffns": described, "every_n_steps": 1, "sites": ["input"], "skip_first": 1}
    with (
        nerve.watch(model, tmp_path / "one", **how) as one,
        nerve.watch(model, tmp_path / "two", **how) as two,
    ):
        for seed in (1, 2):
            model(in_sequences(seed)).sum().backward()
            one.step()
            two.step()
    rows = nerve.load_metrics(tmp_path / "one")
    assert rows["n_samples"].tolist() == [4 * 7] * 4
    assert_same(rows, nerve.load_metrics(tmp_path / "two"))


def test_measuring_within_a_watched_pass_does_not_disturb_it(tmp_path):
    model, x = network(), in_sequences()
    expected = nerve.measure(model.eval(), [x], ffns=ffns(model))
    model.drop.p = 0

    def measure(block: nn.Module, args: object) -> None:
        if block.training:
            nerve.measure(model, [x[:, :5]], ffns=ffns(model))

    model.train().blocks[0].register_forward_pre_hook(measure)
    with nerve.watch(model, tmp_path, ffns=ffns(model)) as run:
        model(x).sum().backward()
        run.step()
    rows = nerve.load_metrics(tmp_path)
    assert rows["n_samples"].tolist() == [32, 32]
    assert rows["pr_post"].tolist() == pytest.approx(expected["pr_post"].tolist(), rel=1e-12)


@pytest.mark.parametrize("n_runs", [1, None])
def test_a_copy_of_a_watched_model_is_not_watched(tmp_path, n_runs):
    """Both are trained, and the copy runs within the other's pass, too."""
    model, x = network(), in_sequences()
    described = [
        nerve.FFNAdapter(i, "ffn", b[0], b[2], n_runs=n_runs) for i, b in enumerate(model.blocks)
    ]

    def run_other(other: nn.Module, *_: object) -> None:
        other(x)

    with nerve.watch(model, tmp_path, ffns=described, every_n_steps=1, sites=["input"]) as run:
        for _ in range(2):
            teacher = copy.deepcopy(model)
            within = model.blocks[0].register_forward_pre_hook(partial(run_other, teacher))
            model(x).sum().backward()
            within.remove()
            teacher(x).sum().backward()
            run.step()
    assert nerve.load_metrics(tmp_path)["n_samples"].tolist() == [32] * 4


@pytest.mark.parametrize("is_compiler_loaded", [True, False])
def test_a_watched_model_can_be_copied_and_saved_like_any_other(
    tmp_path, monkeypatch, is_compiler_loaded
):
    """What is saved runs, and neither is measured; the hooks of an unloaded compiler are bare."""
    if not is_compiler_loaded:
        monkeypatch.setattr(features, "untraced", Hook)
    model, x, file = network(), in_sequences(), io.BytesIO()
    with nerve.watch(model, tmp_path, ffns=ffns(model), every_n_steps=1) as run:
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other.eval()(x), network().eval()(x))
            other.train()(x).sum().backward()
        model(x).sum().backward()
        run.step()
    assert nerve.load_metrics(tmp_path)["n_samples"].tolist() == [32] * 2


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_neither_another_threads_measurement_nor_an_export_is_a_pass(tmp_path):
    """The other thread looks at its model while a pass runs that is watched."""
    model, other, x = network(), network(), in_sequences()
    looks, has_run, errors = threading.Event(), threading.Event(), []

    def waiting(module: nn.Module, *_: object) -> None:
        looks.set()
        has_run.wait(100)

    other.register_forward_hook(waiting)

    def measure() -> None:
        try:
            nerve.measure(other, [x], ffns=ffns(other))
        except BaseException as error:
            errors.append(error)

    with nerve.watch(model, tmp_path, ffns=ffns(model), every_n_steps=1) as run:
        thread = threading.Thread(target=measure)

        def begin(*_: object) -> None:
            if torch.is_grad_enabled() and thread.ident is None:
                thread.start()
                looks.wait(100)

        model.blocks[0][1].register_forward_hook(begin)
        model(x).sum().backward()
        model(x).sum().backward()
        has_run.set()
        thread.join()
        run.step()
        torch.export.export(model, (x,))
        torch.jit.trace(model, x, check_trace=False)
        with pytest.raises(AttributeError, match="Script it before or after the measurement"):
            torch.jit.script(model)
        model(x).sum().backward()
        run.step()
    assert not errors
    assert nerve.load_metrics(tmp_path)["n_samples"].tolist() == [64, 64, 32, 32]


class Remembering(Net):
    """Adds what it has of tokens before, as prefix tuning gives it, and keeps what it has now."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: list[Tensor] | None = None
    ) -> Tensor:
        kept = [] if past_key_values is None else past_key_values
        assert attention_mask.shape[1] == input_ids.shape[1] + sum(map(len, kept))
        x = torch.nn.functional.one_hot(input_ids, 4).double()
        kept.append(x.mean(0))
        return super().forward(x + torch.cat(kept).mean(0))


def test_a_key_value_cache_is_not_sampled_and_left_unchanged(tmp_path):
    """Two sequences: what looks at the order of tokens runs as many, and could add to it."""
    torch.manual_seed(0)
    model = Remembering()
    tokens = torch.randint(4, (2, 6))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    with nerve.watch(model, tmp_path, ffns=ffns(model), every_n_steps=1) as run:
        for _ in range(2):
            kept = [torch.ones(3, 4, dtype=torch.float64)]
            model(tokens, mask, past_key_values=kept).sum().backward()
            run.step()
            assert [len(each) for each in kept] == [3, 6]
    assert nerve.load_metrics(tmp_path)["n_samples"].tolist() == [10] * 4


def test_a_loop_of_functional_calls_is_measured_in_its_mode(tmp_path):
    """Within torch.func parameters cannot be told to take no part in a graph, and so the model
    cannot be looked at; it stays in train mode."""
    model = network()
    values = {name: each.detach() for name, each in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,)).sum()

    with nerve.watch(model, tmp_path / "grad", ffns=ffns(model), every_n_steps=1) as run:
        for _ in range(2):
            torch.func.grad(loss)(values, in_sequences())
            assert all(module.training for module in model.modules())
            run.step()
    assert nerve.load_metrics(tmp_path / "grad")["n_samples"].tolist() == [32] * 4
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")
    with (
        pytest.raises(MeasurementError, match=r"whole batch; .*torch\.func\.vmap"),
        nerve.watch(model, tmp_path / "vmap", ffns=ffns(model)),
    ):
        each(values, in_sequences())


def test_a_generator_that_is_not_resumed_is_an_interrupted_run(tmp_path):
    model = network()

    def steps():
        with nerve.watch(model, tmp_path, ffns=ffns(model), every_n_steps=1) as run:
            for seed in range(9):
                model(in_sequences(seed)).sum().backward()
                run.step()
                yield run.n_steps

    loop = steps()
    assert [next(loop), next(loop)] == [1, 2]
    loop.close()
    assert nerve.RunRecord.load(tmp_path).run_status == "interrupted"
    assert nerve.load_metrics(tmp_path)["step"].tolist() == [0, 0, 1, 1]


def raising_once(error: BaseException) -> Callable[..., None]:
    errors = [error]

    def hook(*_: object) -> None:
        if errors:
            raise errors.pop()

    return hook


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"heldout": torch.zeros(3, 4)}, "list of batches"),
        ({"heldout": []}, "got none"),
        ({"config": {"monitor": 1}}, "another name"),
        ({"every_n_steps": 0}, "^every_n_steps must be"),
        ({"colour": 1}, "colour"),
        ({"config": "mine"}, "config must be a mapping by name.*got str 'mine'"),
        ({"optimizer": "sgd"}, "optimizer must be the optimizer of the loop.*got str 'sgd'"),
        ({"mask": torch.ones(3)}, "mask must be a function.*got Tensor"),
        ({"ffns": [nn.Linear(4, 4)]}, "got one of Linear"),
        ({"resume": "checkpoint.pt"}, "resume must be a mapping"),
    ],
)
def test_invalid_arguments_are_refused_before_a_run_begins(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words), nerve.watch(network(), tmp_path / "run", **given):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", [True, False])
def test_a_watch_is_entered_once(tmp_path, inside):
    """A second time neither begins another run nor disturbs the first."""
    model = network()
    once = nerve.watch(model, tmp_path, every_n_steps=1)
    with once as run:
        if inside:
            with pytest.raises(
                ConfigError, match=r"entered a second time\. Call nerve\.watch again"
            ):
                once.__enter__()
        model(pairs(1)[0][0]).sum().backward()
        run.step(0.5)
    if not inside:
        with pytest.raises(ConfigError, match="entered a second time"), once:
            pass
    assert nerve.RunRecord.load(tmp_path).run_status == "done"
    assert sorted(set(nerve.load_metrics(tmp_path)["step"])) == [0]


def test_a_watch_without_a_with_block_raises(tmp_path):
    run = nerve.watch(network(), tmp_path)
    with pytest.raises(ConfigError, match=r"step was used without one\. Write: with nerve\.watch"):
        run.step(0.5)
    assert not hasattr(run, "anything_else")
    assert not any(tmp_path.iterdir())


def test_without_targets_steps_have_equal_weight_and_targets_require_a_loss(tmp_path):
    model, pair = network(), pairs(1)[0]
    with nerve.watch(model, tmp_path / "a", heldout=[pair[0]], every_n_steps=2) as run:
        run.step(0.5)
        run.step(1.0)
    row = nerve.load_metrics(tmp_path / "a").iloc[-1]
    assert (row["train_loss"], row["tokens_seen"]) == (0.75, 0)
    with (
        pytest.raises(ConfigError, match="or neither"),
        nerve.watch(model, tmp_path / "b") as run,
    ):
        run.step(n_targets=3)


def test_the_arguments_of_a_step_are_checked(tmp_path):
    model = network()
    for given, words in (
        (("much",), "loss of step must be a number or Tensor; got 'much'"),
        ((torch.zeros(2), 3), "must be a scalar mean; got a tensor of shape"),
        ((0.5, "8"), "n_targets of step must be a whole number of at least 0; got '8'"),
        ((0.5, 2.5), "got 2.5"),
        ((0.5, torch.tensor(-1)), "got -1"),
    ):
        with (
            pytest.raises(ConfigError, match=words),
            nerve.watch(model, tmp_path / "a", steps=[9], every_n_steps=None) as run,
        ):
            run.step(*given)
    with nerve.watch(model, tmp_path / "b", heldout=[pairs(1)[0][0]]) as run:
        run.step(torch.tensor(0.5), torch.tensor(3.0))
    assert nerve.load_metrics(tmp_path / "b")["tokens_seen"].max() == 3


def test_a_plain_model_can_be_measured_repeatedly(tmp_path):
    """Training features of modules that were found, of float32, in every cadence of 6 steps."""
    model = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4))
    optimizer = optimizer_of(model)
    with nerve.watch(model, tmp_path, every_n_steps=3) as run:
        for x, y in pairs(6):
            loss = (model(x.float()) - y.float()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss, len(y))
    assert nerve.load_metrics(tmp_path)["step"].tolist() == [0, 3]


class Normed(nn.Sequential):
    """An FFN whose features are mixed before the second projection, and so not found."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 4))


@pytest.mark.parametrize("loop", ["watch", "lightning"])
def test_what_may_be_an_ffn_is_not_left_out_silently(tmp_path, caplog, loop):
    model = network()
    model.blocks[1] = Normed().double()
    if loop == "watch":
        with nerve.watch(model, tmp_path, heldout=[pairs(1)[0][0]]) as run:
            run.step()
    else:
        in_lightning(tmp_path, model, source="heldout")
    assert nerve.load_metrics(tmp_path)["layer"].unique().tolist() == [0]
    (line,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert line.startswith("not measured; if it is an FFN, describe it by hand: nerve.FFNAdapter(")
    assert line.endswith(
        "blocks.1.3)  # features are mixed in between, for example by a normalization"
    )


@pytest.mark.parametrize("source", ["train", "heldout"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({"every_n_steps": None, "steps": [5, 0, 1]}, [0, 1, 5]),
        ({"every_n_steps": 3, "steps": [1, 100]}, [0, 1, 3, 6]),
        ({"every_n_steps": None, "steps": "log:4", "last_step": N_STEPS}, [0, 1, 2, 4]),
        ({"every_n_steps": None, "steps": [2]}, [2]),
    ],
    ids=["list", "union", "log", "not at first"],
)
def test_steps_at_any_places_are_measured(tmp_path, source, accumulate, asked, steps):
    train(tmp_path, network(), source=source, accumulate=accumulate, **asked)
    found = nerve.load_metrics(tmp_path)
    assert sorted(set(found["step"])) == (steps if source == "train" else [*steps, N_STEPS])


def test_logarithmic_steps_require_the_last_step(tmp_path):
    with pytest.raises(ConfigError, match="log:4 needs the last step"):
        train(tmp_path, network(), every_n_steps=None, steps="log:4")


def test_a_loop_that_measures_nothing_says_why(tmp_path, caplog):
    """It forgot to call step, or ended before the first measurement."""
    model, (inputs, _) = network(), pairs(1)[0]
    with nerve.watch(model, tmp_path / "never", every_n_steps=1, ffns=ffns(model)):
        model(inputs).sum().backward()
    assert "nothing was measured: step was not called" in caplog.text
    with nerve.watch(model, tmp_path / "late", steps=[5], every_n_steps=None) as run:
        model(inputs).sum().backward()
        run.step()
    assert "nothing was measured: none of the 1 steps was due" in caplog.text
