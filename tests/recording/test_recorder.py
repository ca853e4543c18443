"""A loop without Lightning records the rows of its measured steps."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nerve import FFNAdapter, measure
from nerve.analysis.load import load_metrics
from nerve.errors import StoreError
from nerve.measuring import clock
from nerve.measuring.eigenproblem import FFNEigenproblem
from nerve.recording.preparation import Preparation
from nerve.recording.recorder import Recorder
from nerve.recording.settings import MonitorSettings
from nerve.spectra import StreamingCovariance, covariance
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))


def ffns(model: nn.Sequential) -> list[FFNAdapter]:
    return [FFNAdapter(0, "ffn", model[0], model[2])]


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 4, generator=generator), torch.randn(32, 1, generator=generator)


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path, RunRecord.create(tmp_path, {}).run_id)


def validate(recorder: Recorder, model: nn.Module, step: int, lr: float = 0.1) -> None:
    """Measures the held-out batches of seeds 100 and 101."""
    recorder.start_validation()
    for seed in (100, 101):
        x, y = batch(seed)
        recorder.start()
        with torch.no_grad():
            loss = nn.functional.mse_loss(model(x), y)
        recorder.stop()
        recorder.add_validation(loss, len(y))
    recorder.label(step, [torch.optim.SGD(model.parameters(), lr=lr)])
    recorder.finish(of_all=False)
    recorder.end_validation()


def test_a_plain_loop_records_what_measure_returns(store):
    """Each row has the weights of its own step; losses and targets in between add up."""
    model, recorder = network(), Recorder(MonitorSettings(every_n_steps=2), store)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    by_hand, losses = [], []
    recorder.open(ffns(model), CPU, anew=True)
    for step in range(5):
        if step % recorder.settings.every_n_steps == 0:
            validate(recorder, model, step)
            by_hand.append(measure(model, [batch(100)[0], batch(101)[0]], ffns=ffns(model)))
        x, y = batch(step)
        loss = nn.functional.mse_loss(model(x), y)
        recorder.add_training(loss.detach(), len(y))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.drain()
    recorder.close()
    rows = load_metrics(store.directory)
    assert rows["step"].tolist() == [0, 2, 4]
    assert rows["tokens_seen"].tolist() == [0, 64, 128]
    assert rows["pr_post"].tolist() == [float(each["pr_post"][0]) for each in by_hand]
    assert rows["train_loss"].tolist()[1:] == pytest.approx(
        [sum(losses[:2]) / 2, sum(losses[2:4]) / 2]
    )
    assert recorder.val_loss == rows["val_loss"].iloc[-1]
    assert recorder.latest[0]["step"] == 4
    assert not model[0]._forward_hooks


def test_a_labeled_step_waits_for_its_features(store):
    """With training data: first the label, then the forward pass of the step that follows."""
    model, recorder = network(), Recorder(MonitorSettings(source="train"), store)
    recorder.open(ffns(model), CPU, anew=True)
    recorder.start_validation()
    recorder.label(7, [])
    assert (recorder.is_due, recorder.due_step) == (True, 7)
    recorder.start()
    model(batch(0)[0])
    recorder.stop()
    recorder.finish(of_all=False)
    assert (recorder.is_due, recorder.due_step) == (False, None)
    assert load_metrics(store.directory)["step"].tolist() == [7]
    recorder.label(8, [])
    recorder.drop_due()
    recorder.finish(of_all=False)
    assert not recorder.is_due
    recorder.close()


def test_the_time_has_all_that_measuring_a_training_step_takes_and_nothing_else(store, monkeypatch):
    """What takes time: the features, their spectra, the rows; and the model, which does not
    count."""
    now = [0.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slowed(function, seconds):
        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return slow

    for kind, name, seconds in (
        (StreamingCovariance, "update", 1),  # of the input, and of post
        (FFNEigenproblem, "solve", 10),
        (RunStore, "flush", 100),
        (nn.ReLU, "forward", 1000),
    ):
        monkeypatch.setattr(kind, name, slowed(getattr(kind, name), seconds))
    model, recorder = network(), Recorder(MonitorSettings(source="train"), store)
    recorder.open(ffns(model), CPU, anew=True)
    recorder.start_validation()
    recorder.label(7, [])
    recorder.end_validation()
    recorder.start()
    model(batch(0)[0])
    recorder.stop()
    recorder.finish(of_all=False)
    recorder.end_step()
    recorder.wait()
    assert (recorder.seconds, now[0]) == (112, 1112)
    recorder.close()


def test_a_recorder_continues_from_the_state_of_another(store):
    """Number of targets, last rows and time continue, unless training starts over."""
    model, first = network(), Recorder(MonitorSettings(), store)
    first.open(ffns(model), CPU, anew=True)
    first.add_training(torch.tensor(2.0), 32)
    validate(first, model, 1)
    state = first.state_dict()
    first.close()
    second = Recorder(MonitorSettings(), store)
    second.open(ffns(model), CPU, anew=True)
    second.load_state_dict(state)
    assert (second.latest, second.val_loss) == (first.latest, first.val_loss)
    assert second.seconds == first.seconds > 0
    second.add_training(torch.tensor(1.0), 32)
    validate(second, model, 2)
    assert load_metrics(store.directory)["tokens_seen"].tolist() == [32, 64]
    second.close()
    second.open(ffns(model), CPU, anew=True)
    assert (second.seconds, second.val_loss) == (0.0, None)
    second.close()


@pytest.mark.parametrize(
    ("late", "notes"),
    [(StoreError("full"), ["Then, as the run ended: StoreError: full"]), (None, [])],
)
def test_the_error_that_ends_training_is_the_one_that_is_raised(store, late, notes):
    """An error while the rest is written becomes a note of it; the hooks are removed."""
    model, recorder = network(), Recorder(MonitorSettings(), store)
    recorder.open(ffns(model), CPU, anew=True)
    recorder.start()
    if late is not None:
        recorder.drain = raising(late)
    error = ValueError("mine")
    recorder.fail(error)
    assert getattr(error, "__notes__", []) == notes
    assert not model[0]._forward_hooks


def test_ctrl_c_while_the_rest_is_written_leaves_no_hooks(store):
    model, recorder = network(), Recorder(MonitorSettings(), store)
    recorder.open(ffns(model), CPU, anew=True)
    recorder.drain = raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        recorder.fail(ValueError("mine"))
    assert not model[0]._forward_hooks


def raising(error: BaseException):
    def call() -> None:
        raise error

    return call


def test_a_closed_recorder_keeps_no_model(store):
    """Nor the solver's memory, which is pinned with a GPU."""
    model, recorder = network(), Recorder(MonitorSettings(), store)
    recorder.open(ffns(model), CPU, anew=True)
    seen = [weakref.ref(model), weakref.ref(recorder._pipeline._solver)]
    validate(recorder, model, 0)
    recorder.drain()
    recorder.close()
    del model
    gc.collect()
    assert [each() for each in seen] == [None, None]
    assert recorder.latest[0]["step"] == 0


@pytest.mark.parametrize("groups", [[], ["halves"]])
def test_the_preparation_receives_all_products_that_were_used(store, monkeypatch, groups):
    """Although the precision in the row names only the coarsest of them."""
    started: list[set[str]] = []
    monkeypatch.setattr(covariance, "default_product", lambda dtype, device: "bfloat16")
    monkeypatch.setattr(Preparation, "start", lambda self, products: started.append(products))
    settings = MonitorSettings(source="train", shortcut="projected", groups=groups)
    model, recorder = network().bfloat16(), Recorder(settings, store)
    recorder.open(ffns(model), CPU, anew=True)
    recorder.label(0, [])
    recorder.start()
    model(torch.randn(4, 64, 4, generator=torch.Generator().manual_seed(0)).bfloat16())
    recorder.stop()
    recorder.finish(of_all=False)
    assert recorder.latest[0]["precision"] == "projected_bfloat16"
    assert started == [{"projected_bfloat16", "bfloat16"}]
    recorder.close()
