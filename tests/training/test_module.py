"""Training: the logged losses and their steps, the updates, and divergence."""

from copy import deepcopy
from functools import partial

import lightning as L
import numpy as np
import pytest
import pytorch_optimizer
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from support import Batches
from torch import nn
from torch.optim import SGD, AdamW

from nerve.errors import DivergedError
from nerve.models import build_model
from nerve.optim import Part, Schedule, build_optimizer, parameter_roles
from nerve.training.module import ImageClassifier, LanguageModel, TrainedModel

N_CLASSES, N_PIXELS = 3, 4
LR = 0.5
SCHEDULE = Schedule("linear", warmup=0.3)


class Logged(Logger):
    """Keeps what Lightning logs, as name to {step: value}."""

    name = "logged"
    version = 0

    def __init__(self):
        super().__init__()
        self.values = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        for name, value in metrics.items():
            self.values.setdefault(name, {})[step] = value


class Updates(L.Callback):
    """Keeps the weights after each number of updates, and the learning rate of each update."""

    def __init__(self):
        self.weights = {}
        self.lrs = []

    def on_train_start(self, trainer, module):
        self.on_train_batch_end(trainer, module)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.lrs.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, *args):
        weights = {name: value.clone() for name, value in module.model.state_dict().items()}
        self.weights[trainer.global_step] = weights


def linear_classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(N_PIXELS, N_CLASSES))


def classifier() -> ImageClassifier:
    return ImageClassifier(linear_classifier(), lambda m: SGD(m.parameters(), lr=LR), SCHEDULE)


def image_batches(*sizes: int, seed: int = 0) -> Batches:
    rng = torch.Generator().manual_seed(seed)
    return Batches(
        (
            torch.randn(n, 1, 2, 2, generator=rng),
            torch.randint(N_CLASSES, (n,), generator=rng),
        )
        for n in sizes
    )


def fit(
    module: TrainedModel,
    train: Batches,
    heldout: Batches,
    *,
    accumulate=1,
    every=1,
    callbacks=(),
    **arguments,
):
    """Trains on all of `train` and validates at the given interval; returns updates and log."""
    updates, logged = Updates(), Logged()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=len(train) // accumulate,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=every * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[updates, *callbacks],
        logger=logged,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(module, train, heldout)
    return updates, logged.values


def cross_entropies(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """-ln softmax(logits)[target] of each target, in float64 NumPy."""
    rows = logits.detach().numpy().astype(np.float64).reshape(-1, logits.shape[-1])
    normalizer = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
    return normalizer - rows[np.arange(len(rows)), targets.numpy().ravel()]


def validated(module: TrainedModel, batches: Batches) -> dict[str, float]:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    (metrics,) = trainer.validate(module, batches, verbose=False)
    return metrics


def test_validation_loss_and_accuracy_are_means_over_images_not_over_batches():
    module, heldout = classifier(), image_batches(5, 5, 1)
    images, labels = (torch.cat(parts) for parts in zip(*heldout, strict=True))
    logits = module(images)
    metrics = validated(module, heldout)
    assert metrics["val_loss"] == pytest.approx(cross_entropies(logits, labels).mean(), rel=1e-6)
    correct = (logits.detach().numpy().argmax(1) == labels.numpy()).sum()
    assert 0 < correct < 11
    assert metrics["val_accuracy"] == pytest.approx(correct / 11, rel=1e-6)


def test_the_loss_of_a_language_model_is_a_mean_over_tokens():
    torch.manual_seed(0)
    model = nn.Embedding(7, 7)  # logits of the next token, given the last one
    module = LanguageModel(model, lambda m: SGD(m.parameters(), lr=LR), SCHEDULE)
    batches = Batches((torch.randint(7, (n, 6)), torch.randint(7, (n, 6))) for n in (4, 1))
    expected = np.concatenate([cross_entropies(module(x), y) for x, y in batches])
    assert len(expected) == 5 * 6
    assert validated(module, batches) == {
        "val_loss": pytest.approx(expected.mean(), rel=1e-6),
        "step": 0,
    }


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_a_step_gives_its_mean_loss_and_what_it_is_a_mean_of(step, monkeypatch):
    module = classifier()
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(TrainedModel, "global_step", 0)
    ((images, labels),) = image_batches(5)
    outputs = getattr(module, step)((images, labels), 0)
    assert outputs["n_targets"] == 5
    expected = cross_entropies(module(images), labels).mean()
    assert outputs["loss"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_logged_at_a_step_is_of_the_weights_after_that_many_updates(accumulate):
    module, train = classifier(), image_batches(*[5] * (4 * accumulate))
    heldout = image_batches(6, 2, seed=1)
    updates, logged = fit(module, train, heldout, accumulate=accumulate, every=2)

    def loss(step: int, *batches) -> float:
        module.model.load_state_dict(updates.weights[step])
        return np.concatenate([cross_entropies(module(x), y) for x, y in batches]).mean()

    assert logged["val_loss"] == {s: pytest.approx(loss(s, *heldout), rel=1e-6) for s in (2, 4)}
    assert set(logged["val_accuracy"]) == {2, 4}
    # Of accumulated micro-batches Lightning logs the last.
    lasts = train[accumulate - 1 :: accumulate]
    assert logged["train_loss"] == {
        s: pytest.approx(loss(s, batch), rel=1e-6) for s, batch in enumerate(lasts)
    }


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_schedule_counts_updates_and_micro_batches_are_averaged(accumulate):
    """Compared with a plain loop that averages the micro-batches of each update."""
    n_steps = 7
    train = image_batches(*[5] * (n_steps * accumulate))
    updates, _ = fit(classifier(), train, image_batches(2), accumulate=accumulate)
    lrs = [LR * SCHEDULE.multiplier(step, n_steps) for step in range(n_steps)]
    assert updates.lrs == pytest.approx(lrs, rel=1e-12)
    assert lrs[:4] == pytest.approx([LR / 2, LR, LR, LR * 4 / 5])  # 2 steps of warm-up

    model = linear_classifier()
    for step, lr in enumerate(lrs):
        own = train[step * accumulate : (step + 1) * accumulate]
        images, labels = (torch.cat(parts) for parts in zip(*own, strict=True))
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= lr * gradient
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(updates.weights[n_steps][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("off", [0, 0.0, -1])
def test_a_gradient_clip_of_nothing_clips_nothing(off):
    """As in Lightning; a small positive value does clip."""
    train, heldout = image_batches(5, 5), image_batches(2)
    plain, unclipped, clipped = (
        fit(classifier(), train, heldout, gradient_clip_val=value)[0].weights[2]
        for value in (None, off, 1e-3)
    )
    for name, weight in plain.items():
        assert torch.equal(unclipped[name], weight)
        assert not torch.equal(clipped[name], weight)


def poisoned(train: Batches, index: int, value: float) -> Batches:
    batches = [(images.clone(), labels) for images, labels in train]
    batches[index][0][0, 0, 0, 0] = value
    return Batches(batches)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("accumulate", "index", "step"), [(1, 0, 0), (1, 3, 3), (1, 5, 5), (3, 6, 2), (3, 7, 2)]
)
def test_a_loss_that_is_not_finite_ends_training_at_its_step(accumulate, index, step, value):
    module = classifier()
    train = poisoned(image_batches(*[5] * (6 * accumulate)), index, value)
    seen = []
    module.model.register_forward_hook(lambda model, inputs, output: seen.append(model.training))
    with pytest.raises(DivergedError, match=rf"NaN or infinite at step {step}\. Lower optimizer"):
        fit(module, train, image_batches(2), accumulate=accumulate, every=100)
    assert sum(seen) == index + 1  # no batch is wasted after it


def test_a_module_that_has_diverged_may_fit_again():
    module, good = classifier(), image_batches(*[5] * 6)
    weights = deepcopy(module.model.state_dict())
    with pytest.raises(DivergedError, match="at step 3"):
        fit(module, poisoned(image_batches(*[5] * 6), 3, float("nan")), image_batches(2), every=100)
    module.model.load_state_dict(weights)
    fit(module, good, image_batches(2), every=100)


def test_on_an_accelerator_the_first_bad_step_is_named_though_it_is_looked_for_later():
    class Elsewhere(ImageClassifier):
        device = torch.device("cuda")  # what decides how often the loss is looked at

    plain = classifier()
    module = Elsewhere(plain.model, plain._build_optimizer, plain._schedule)
    train = poisoned(image_batches(*[5] * 6), 3, float("nan"))
    with pytest.raises(DivergedError, match=r"at step 3\."):
        fit(module, train, image_batches(2), every=100)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_on_an_accelerator_epochs_shorter_than_the_interval_of_checks_are_checked(monkeypatch):
    """The loss of step 2 is bad; in epochs of 3 batches without validation it ends the fit when as
    many losses as the interval are there, those of earlier epochs included."""

    class Elsewhere(ImageClassifier):
        device = torch.device("cuda")

    class Break(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 2:
                nn.init.constant_(module.model[1].weight, float("nan"))

    monkeypatch.setattr("nerve.training.module.CHECK_EVERY_N_LOSSES", 4)
    plain = classifier()
    module = Elsewhere(plain.model, plain._build_optimizer, plain._schedule)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=30,
        callbacks=[Break()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(DivergedError, match=r"at step 2\."):
        trainer.fit(module, image_batches(*[5] * 3))
    assert trainer.global_step == 4


def test_weights_that_break_in_the_last_update_end_the_run_as_diverged():
    """All training losses are finite; the validation after the last update is the first to show
    it."""
    module = classifier()

    class Break(Updates):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == 3:
                nn.init.constant_(module.model[1].weight, float("nan"))

    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        max_epochs=-1,
        callbacks=[Break()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(DivergedError, match=r"at step 3\."):
        trainer.fit(module, image_batches(*[5] * 3), image_batches(2))


@pytest.mark.parametrize("constraint", ["none", "weight_norm"])
def test_nothing_without_matrix_shape_is_decayed_on_the_way_through_the_trainer(constraint):
    """AdamW decays p by lr · decay · p whatever the gradient; the test checks this difference."""
    lr, decay = 0.01, 0.5
    values = {
        "model": {"kind": "mixer", "n_layers": 1, "d_model": 4, "patch_size": 1},
        "normalization": {},
        "activation": {"name": "learnable_leaky_relu"},
        "position": {"name": "none"},
        "ffn": {"width": 2, "constraint": constraint},
    }
    data_dims = {"image_size": 2, "n_channels": 1, "n_classes": N_CLASSES}

    def weights_after_one_step(weight_decay: float) -> tuple[dict, dict]:
        model = build_model(values, seed=0, **data_dims)
        rng = torch.Generator().manual_seed(0)
        for parameter in model.parameters():  # biases are 0 at first, where decay would not show
            parameter.data = 0.5 + torch.rand(parameter.shape, generator=rng)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        build = partial(AdamW, lr=lr, weight_decay=weight_decay)
        parts = {"main": Part(("hidden", "embedding", "head", "vector"), build)}
        module = ImageClassifier(
            model, lambda m: build_optimizer(m, parts), Schedule("constant", cooldown=0.0)
        )
        fit(module, image_batches(5), image_batches(2))
        return before, dict(model.named_parameters())

    before, plain = weights_after_one_step(0.0)
    _, decayed = weights_after_one_step(decay)
    roles = parameter_roles(build_model(values, seed=0, **data_dims))
    vectors = {name for name, role in roles.items() if role == "vector"}
    for kind in ("bias", "norm", "slope", *(["original0"] if constraint != "none" else [])):
        assert any(kind in name for name in vectors), kind
    for name, weight in plain.items():
        if name in vectors:
            assert torch.equal(decayed[name], weight), name
        else:
            torch.testing.assert_close(
                weight - decayed[name], lr * decay * before[name], rtol=1e-3, atol=1e-6
            )


@pytest.mark.parametrize("other", [3.0, -0.5, 0.0])
def test_the_logged_training_loss_is_the_mean_over_processes(monkeypatch, other):
    """As in the metric rows; the loss of the other process differs by `other`."""
    train, heldout = image_batches(*[5] * 4), image_batches(2)
    _, alone = fit(classifier(), train, heldout, every=100)
    monkeypatch.setattr("nerve.training.module.n_processes", lambda: 2)
    monkeypatch.setattr(
        "nerve.training.module.add_up", lambda mine: mine.add_(mine.clone()).add_(other)
    )
    _, logged = fit(classifier(), train, heldout, every=100)
    assert logged["train_loss"] == {
        step: pytest.approx(loss + other / 2, rel=1e-6)
        for step, loss in alone["train_loss"].items()
    }
    assert len(logged["train_loss"]) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("step", [0, 2])
def test_a_loss_that_diverges_in_another_process_ends_this_one_too(monkeypatch, value, step):
    """Its own loss is finite; otherwise it would wait for the other process in the next
    collective."""
    losses = iter([0.0] * step + [value] * 9)
    monkeypatch.setattr("nerve.training.module.n_processes", lambda: 2)
    monkeypatch.setattr("nerve.training.module.add_up", lambda mine: mine.add_(next(losses)))
    monkeypatch.setattr("nerve.training.module.highest", lambda mine, device: mine)
    with pytest.raises(DivergedError, match=rf"at step {step}\."):
        fit(classifier(), image_batches(*[5] * 4), image_batches(2), every=100)


def test_a_validation_that_diverges_in_another_process_ends_this_one_too(monkeypatch):
    monkeypatch.setattr("nerve.training.module.highest", lambda mine, device: max(mine, -2))
    with pytest.raises(DivergedError, match=r"at step 2\."):
        fit(classifier(), image_batches(*[5] * 4), image_batches(2), every=2)


class BreakGradients(L.Callback):
    """Makes gradients non-finite at step 2, while the loss is finite."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 2:
            for parameter in module.parameters():
                parameter.grad.fill_(self.value)


def refusing(error: type[Exception], reason: str):
    class Refusing(SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            if any(not p.isfinite().all() for g in self.param_groups for p in g["params"]):
                raise error(reason)
            return loss

    return partial(Refusing, lr=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "build",
    [
        partial(pytorch_optimizer.Shampoo, lr=0.1, preconditioning_compute_steps=1),
        partial(pytorch_optimizer.SOAP, lr=0.1, precondition_frequency=1),
        refusing(torch.linalg.LinAlgError, "the matrix is singular"),
        refusing(RuntimeError, "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"),
    ],
    ids=["shampoo", "soap", "singular", "cusolver"],
)
def test_numbers_that_the_optimizer_is_the_first_to_find_not_finite_are_a_divergence(value, build):
    module = ImageClassifier(linear_classifier(), lambda m: build(m.parameters()), SCHEDULE)
    with pytest.raises(DivergedError, match=r"NaN or infinite at step [23]\. Lower optimizer"):
        fit(module, image_batches(*[5] * 6), image_batches(2), callbacks=[BreakGradients(value)])


def test_what_an_optimizer_refuses_of_finite_numbers_is_no_divergence():
    class Refusing(SGD):
        def step(self, closure=None):
            super().step(closure)
            raise torch.linalg.LinAlgError("the matrix is singular")

    module = ImageClassifier(
        linear_classifier(), lambda m: Refusing(m.parameters(), lr=0.1), SCHEDULE
    )
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        fit(module, image_batches(5), image_batches(2))


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("CUDA error: misaligned"), torch.OutOfMemoryError("CUDA out")]
)
def test_an_error_of_the_device_is_no_divergence_and_no_tensor_is_read_after_it(error, monkeypatch):
    """After such an error, reading a tensor would raise another, which would hide it."""
    monkeypatch.setattr("nerve.training.module._is_finite", lambda parameter: 1 / 0)
    module = ImageClassifier(
        linear_classifier(),
        lambda m: refusing(type(error), str(error))(m.parameters()),
        SCHEDULE,
    )
    with pytest.raises(type(error), match="CUDA"):
        fit(
            module,
            image_batches(*[5] * 6),
            image_batches(2),
            callbacks=[BreakGradients(float("nan"))],
        )


def test_gradients_are_clipped_whatever_hooks_a_subclass_has_and_whichever_fit_it_is():
    """A step of rate 1 moves the weights by the norm of the gradients."""

    class Own(ImageClassifier):
        def on_train_start(self):
            pass

    model, constant = linear_classifier(), Schedule("constant", cooldown=0.0)
    module = Own(model, lambda m: SGD(m.parameters(), lr=1.0), constant)
    for _ in range(2):
        module.model[1] = nn.Linear(N_PIXELS, N_CLASSES)
        before = deepcopy(module.model.state_dict())
        fit(module, image_batches(5), image_batches(2), gradient_clip_val=1e-3)
        moves = [(value - before[name]).flatten() for name, value in model.state_dict().items()]
        assert float(torch.cat(moves).norm()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_a_fused_optimizer_with_a_scaler_clips_as_another_does(algorithm, clip):
    """Such an optimizer unscales gradients itself, after clipping, which Lightning refuses."""

    def weights(fused: bool) -> dict[str, torch.Tensor]:
        module = ImageClassifier(
            linear_classifier(),
            lambda m: AdamW(m.parameters(), lr=0.01, fused=fused, eps=1e-2),
            SCHEDULE,
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        fit(
            module,
            image_batches(*[5] * 4),
            image_batches(2),
            plugins=[precision],
            gradient_clip_val=clip,
            gradient_clip_algorithm=algorithm,
        )
        return module.model.state_dict()

    fused, plain = weights(True), weights(False)
    assert not torch.equal(fused["1.weight"], linear_classifier().state_dict()["1.weight"])
    for name, weight in plain.items():
        torch.testing.assert_close(fused[name], weight, rtol=1e-5, atol=1e-7)
