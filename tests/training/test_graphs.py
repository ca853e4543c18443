"""Training with CUDA graphs: what is replayed, what is not, and that results do not depend on
it."""

import copy
import logging
from functools import partial
from types import SimpleNamespace

import jaxtyping
import lightning as L
import numpy as np
import pytest
import torch
from language_models import SEQ, language_model
from torch import Tensor, nn

from nerve.data.batches import BatchLoader
from nerve.measuring.ffns import FFNAdapter
from nerve.measuring.probe import Probe
from nerve.models import Regularizer
from nerve.optim import Schedule
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore
from nerve.training import graphs
from nerve.training.graphs import CompiledLosses, flop_of_a_matrix, own_gradients, reason_against
from nerve.training.module import LanguageModel
from nerve.training.monitor import FitMonitor

VOCAB, BATCH = 11, 4


@pytest.fixture
def marked(monkeypatch):
    """The beginnings of steps, in place of torch's mark, whose module warns when it is imported."""
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    return marks


def make_module(compile: bool, regularizer: Regularizer | None = None, **given) -> LanguageModel:
    schedule = Schedule("cosine", warmup=0.2)
    return language_model(VOCAB, schedule, compile=compile, regularizer=regularizer, **given)


class InOrder:
    """Batch i is the i-th, so that a resumed run continues with the next one."""

    batch_size = BATCH

    def indices(self, i: int) -> np.ndarray:
        return np.arange(i * BATCH, (i + 1) * BATCH)


def batches(n: int) -> BatchLoader:
    """Tokens that mostly are one more than the previous one, so that a model can learn."""
    rng = np.random.default_rng(0)
    tokens = (rng.integers(VOCAB, size=(n * BATCH, 1)) + np.arange(SEQ + 1)) % VOCAB
    noise = rng.integers(VOCAB, size=tokens.shape)
    mixed = torch.from_numpy(np.where(rng.random(tokens.shape) < 0.3, noise, tokens))
    return BatchLoader(lambda rows: (mixed[rows, :-1], mixed[rows, 1:]), InOrder(), n)


class StopAt(L.Callback):
    """Ends training early, like a signal."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


class Losses(L.Callback):
    """The loss of each batch, read when training is over, as a logger might."""

    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.kept.append(outputs["loss"])


def fit(directory, module, n, *, accumulate=1, callbacks=(), ckpt=None, **trainer):
    """Trains on `n` batches and measures the training batch at every third step; returns its
    losses."""
    store = RunStore(directory, "run")
    if not directory.exists():
        RunRecord.create(directory, {}, run_id="run")
    losses = Losses()
    monitor = FitMonitor(store, every_n_steps=3, source="train")
    fitted = L.Trainer(
        **({"accelerator": "cpu"} | trainer),
        devices=1,
        max_steps=n // accumulate,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        callbacks=[monitor, losses, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fitted.fit(module, batches(n), batches(2), ckpt_path=ckpt)
    store.flush(fitted.global_step)
    return torch.stack(losses.kept).cpu(), fitted


class Replays:
    """Replaces `torch.compile`: in graph mode, a call first destroys the results of the previous
    one, including gradients, because a replay overwrites them."""

    def __init__(self, module: LanguageModel):
        self.n = {"default": 0, "reduce-overhead": 0}
        self._parameters = list(module.parameters())
        self._given: list[Tensor] = []
        self._before: list[Tensor | None] = []
        self._replayed = False
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: Tensor) -> None:
        """Notes a gradient that the replay wrote, not one that was added to an existing one."""
        there = {each.data_ptr() for each in self._before if each is not None}
        if self._replayed and parameter.grad.data_ptr() not in there:
            self._given.append(parameter.grad.detach())

    def compile(self, losses, mode="default"):
        def run(batch):
            self.n[mode] += 1
            self._replayed = mode == "reduce-overhead"
            self._before = [each.grad for each in self._parameters]
            if self._replayed:
                for tensor in self._given:
                    tensor.fill_(torch.nan)
                self._given.clear()
            loss, other = losses(batch)
            if self._replayed:
                self._given += [each.detach() for each in (loss, other) if each is not None]
            return loss, other

        return run


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("weight", [0.0, -0.1])
def test_nothing_that_a_replay_overwrites_is_read_later(
    tmp_path, monkeypatch, marked, accumulate, weight
):
    """Losses, weights and measured rows equal those of training without graphs."""
    name = "participation_ratio" if weight else "none"
    found = {}
    for is_graphed in (False, True):
        module = make_module(False, Regularizer(name, weight))
        if is_graphed:
            replays = Replays(module)
            monkeypatch.setattr(torch, "compile", replays.compile)
            monkeypatch.setattr(graphs, "choose", lambda *_: True)
            monkeypatch.setattr("nerve.training.module.choose", lambda *_: True)
            module._compiled = CompiledLosses(module._losses)
        n = 8 * accumulate
        losses, _ = fit(tmp_path / str(is_graphed), module, n, accumulate=accumulate)
        found[is_graphed] = losses, [p.detach().clone() for p in module.parameters()]
    # Steps 0, 3 and 6 are measured, each in all of its batches.
    assert replays.n == {"default": 3 * accumulate, "reduce-overhead": 5 * accumulate}
    assert len(marked) == 5 * accumulate
    assert torch.equal(found[True][0], found[False][0])
    assert all(map(torch.equal, found[True][1], found[False][1]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_of_replays_stops_and_goes_on(tmp_path, monkeypatch, marked, accumulate):
    """Equal in every bit to one that did not stop, and to one without graphs."""
    monkeypatch.setattr("nerve.training.module.choose", lambda *_: True)

    def replaying(directory, **arguments):
        module = make_module(False)
        replays = Replays(module)
        monkeypatch.setattr(torch, "compile", replays.compile)
        module._compiled = CompiledLosses(module._losses)
        losses, trainer = fit(directory, module, n, accumulate=accumulate, **arguments)
        assert replays.n["reduce-overhead"] > 0
        return losses, trainer, module

    n = 8 * accumulate
    plain = make_module(False)
    expected, _ = fit(tmp_path / "plain", plain, n, accumulate=accumulate)
    first, trainer, _ = replaying(tmp_path / "parts", callbacks=[StopAt(4)])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, _, module = replaying(tmp_path / "parts", ckpt=tmp_path / "half.ckpt")
    assert len(first) == 4 * accumulate
    assert torch.equal(torch.cat([first, second]), expected)
    assert all(map(torch.equal, module.parameters(), plain.parameters()))


def test_the_double_destroys_what_is_not_copied(tmp_path, monkeypatch, marked):
    """Without the copies, the test above would fail."""
    module = make_module(False)
    replays = Replays(module)
    monkeypatch.setattr(torch, "compile", replays.compile)
    monkeypatch.setattr("nerve.training.module.choose", lambda *_: True)
    monkeypatch.setattr("nerve.training.module.own_gradients", lambda _: None)
    module._compiled = CompiledLosses(module._losses)
    with pytest.raises(Exception, match="finite"):
        fit(tmp_path, module, 8, accumulate=2)


def test_the_first_batch_of_a_fit_owns_its_gradients():
    """In a fit that resumes in the middle of an accumulation, gradients are not zeroed first."""
    module = make_module(False)
    module._trainer = SimpleNamespace(accumulate_grad_batches=2, global_rank=0)
    module._compiled = SimpleNamespace(is_replaying=True)
    weight = module.model.head.weight
    module.on_fit_start()
    kept = []
    for _ in range(2):
        weight.grad = torch.ones_like(weight)  # as a replay gives them
        given = weight.grad
        module.on_after_backward()
        kept.append(weight.grad is given)
    assert kept == [False, True]


def test_own_gradients_are_equal_and_elsewhere():
    linear = nn.Linear(3, 2)
    linear(torch.ones(1, 3)).sum().backward()
    linear.register_parameter("unused", nn.Parameter(torch.ones(1)))
    before = [linear.weight.grad, linear.bias.grad]
    own_gradients(linear.parameters())
    for old, new in zip(before, [linear.weight.grad, linear.bias.grad], strict=True):
        assert torch.equal(old, new)
        assert old.data_ptr() != new.data_ptr()
    assert linear.unused.grad is None


def test_graphs_and_plain_code_are_compiled_apart(monkeypatch, marked):
    """One function in two modes: neither runs the other's code or compiles again."""
    modes = []

    def backend(graph, inputs, *, mode=None):
        modes.append(mode)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    linear = nn.Linear(3, 2)
    compiled = CompiledLosses(lambda batch: (linear(batch[0]).sum(), None))
    compiled.replay(True)
    probe = Probe([FFNAdapter(0, "ffn", linear, nn.Linear(2, 3))])
    for _ in range(2):
        compiled((torch.ones(1, 3), torch.ones(1)))
        assert compiled.is_replaying
        probe.start(lambda *_: None)
        compiled((torch.ones(1, 3), torch.ones(1)))
        assert not compiled.is_replaying
        probe.stop()
    assert modes == ["reduce-overhead", None]


def trainer_on(device: str, **arguments) -> L.Trainer:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **arguments)
    trainer.strategy._root_device = torch.device(device)
    return trainer


def watching(module, *_):
    """A hook of other code."""


@pytest.mark.parametrize(
    ("device", "devices", "hook", "expected"),
    [
        ("cpu", 1, None, "training is on the cpu"),
        ("cuda:0", 1, None, None),
        ("cuda:0", 1, watching, "the hook watching on blocks.1.ffn.act would not run in a replay"),
    ],
)
def test_what_forbids_graphs(device, devices, hook, expected):
    module = make_module(False, Regularizer("participation_ratio", 0.1))
    monitor = Probe([block.ffn for block in module.model.blocks])
    monitor.install()  # ours: they know compiled code
    if hook:
        module.model.blocks[1].ffn.act.register_forward_hook(hook)
    assert reason_against(trainer_on(device, devices=devices), module.model) == expected


def test_a_hook_on_all_modules_forbids_them():
    handle = nn.modules.module.register_module_forward_hook(watching)
    try:
        why = reason_against(trainer_on("cuda:0"), make_module(False).model)
    finally:
        handle.remove()
    assert why == "a hook on all modules would not run in a replay"


def test_several_processes_run_without_graphs():
    trainer = trainer_on("cpu", devices=2, strategy="ddp")
    trainer.strategy.parallel_devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    why = reason_against(trainer, nn.Linear(2, 2))
    assert why == "several processes exchange gradients in the backward pass"


@pytest.mark.parametrize(("n_positions", "expected"), [(10, True), (10**12, False)])
def test_the_choice_is_said_in_one_line(caplog, n_positions, expected):
    with caplog.at_level(logging.INFO, "nerve"):
        chosen = graphs.choose(trainer_on("cuda:0"), make_module(False).model, n_positions)
    assert chosen is expected
    (line,) = [each.message for each in caplog.records if each.name == graphs.__name__]
    assert line.startswith("compiled, with CUDA" if expected else "compiled, without CUDA")


def test_the_operations_of_a_matrix():
    """2 · d_in · d_out per position forward, twice that backward; also for a constrained matrix."""
    model = make_module(False, ffn={"constraint": "spectral_norm"}).model
    layer = 16 * 48 + 16 * 16 + 2 * 16 * 32
    mean = (2 * layer + 16 * VOCAB) / 9
    assert flop_of_a_matrix(model, 100) == pytest.approx(6 * 100 * mean)
    assert flop_of_a_matrix(nn.GELU(), 100) == 0


# On a GPU, where graphs are made: jaxtyping's checks are no code that can be compiled.


def on_cuda(test):
    """Ignores the warnings of torch's compiler about its own parts."""
    return pytest.mark.cuda(pytest.mark.filterwarnings("ignore")(test))


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def n_graphs() -> int:
    """The number of roots of the graph trees that torch keeps on the GPU."""
    from torch._inductor.cudagraph_trees import get_container

    manager = get_container(0).tree_manager
    return 0 if manager is None else sum(map(len, manager.roots.values()))


def on_gpu(directory, is_graphed: bool, monkeypatch, n: int, module=None, **arguments):
    """`fit` on the GPU in bfloat16, with or without graphs; fails if torch created none."""
    torch.compiler.reset()
    monkeypatch.setattr("nerve.training.module.choose", lambda *_: is_graphed)
    module = module or make_module(True)
    skipped = graphs.n_skipped()
    found = fit(directory, module, n, accelerator="gpu", precision="bf16-mixed", **arguments)
    assert graphs.n_skipped() == skipped
    assert (n_graphs() > 0) is is_graphed
    return *found, module


@on_cuda
@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_are_those_without_graphs_over_200_steps(
    tmp_path, monkeypatch, compiled, accumulate
):
    """With clipping, a learning rate that changes at every step, and every third step measured."""
    found = {}
    for name, is_graphed in (("plain", False), ("again", False), ("graphs", True)):
        n = 200 * accumulate
        found[name], *_ = on_gpu(tmp_path / name, is_graphed, monkeypatch, n, accumulate=accumulate)
    by_chance = (found["again"] - found["plain"]).abs().max().item()
    by_graphs = (found["graphs"] - found["plain"]).abs().max().item()
    print(f"losses over 200 steps apart: by chance {by_chance:.2e}, by graphs {by_graphs:.2e}")
    assert found["plain"][-20:].mean() < found["plain"][:20].mean() - 0.01
    assert by_graphs <= max(3 * by_chance, 2e-3)


@on_cuda
def test_a_run_with_graphs_stops_and_goes_on(tmp_path, monkeypatch, compiled):
    """By SGD: a GPU adds gradients up in any order, and where one is near 0 AdamW makes a step of
    full length of the last digit. A rounding of 1e-7 moves losses by 3e-4 and weights by 2e-4 here;
    momentum that is not restored moves both by 4e-2, a rate that is one step late by 1.4e-2."""
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    one, half, two = (make_module(True, optimizer=sgd) for _ in range(3))
    whole, *_ = on_gpu(tmp_path / "whole", True, monkeypatch, 20, one)
    stop = [StopAt(10)]
    first, trainer, _ = on_gpu(tmp_path / "parts", True, monkeypatch, 20, half, callbacks=stop)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    second, *_ = on_gpu(tmp_path / "parts", True, monkeypatch, 20, two, ckpt=path)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=2e-3)
    for mine, others in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(mine, others, rtol=0, atol=2e-3)


@on_cuda
@pytest.mark.parametrize(
    "changes",
    [
        {"ffn": {"constraint": "spectral_norm"}},
        {"ffn": {"gated": True}, "position": {"name": "rope"}},
        {"activation": {"name": "learnable_leaky_relu"}, "position": {"name": "alibi"}},
        {"regularizer": Regularizer("participation_ratio", -0.01)},
    ],
    ids="+".join,
)
def test_what_a_model_is_made_of_can_be_replayed(tmp_path, monkeypatch, compiled, changes):
    found = []
    for is_graphed in (False, True):
        module = make_module(True, **copy.deepcopy(changes))
        directory = tmp_path / str(is_graphed)
        found.append(on_gpu(directory, is_graphed, monkeypatch, 30, module)[0])
    print(f"{changes}: losses apart by {(found[0] - found[1]).abs().max():.2e}")
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=5e-3)


@on_cuda
def test_each_replay_draws_other_dropout_masks(compiled):
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).cuda()
    losses = CompiledLosses(lambda batch: (model(batch[0]).square().mean(), None))
    losses.replay(True)
    batch = (torch.ones(8, 64, device="cuda"), torch.ones(8, device="cuda"))
    found = []
    for _ in range(6):
        model.zero_grad()
        loss, _ = losses(batch)
        loss.backward()
        found.append(loss.item())
    assert n_graphs() > 0
    assert len(set(found)) == len(found)
