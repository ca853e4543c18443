"""The parts together do exactly what they do alone, and act as one optimizer everywhere."""

import copy
import io
import pickle
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from nerve.errors import ConfigError
from nerve.optim import CombinedOptimizer, Dion, Part, Schedule, build_optimizer

SCHEDULE = Schedule("cosine", warmup=0.25, final=0.1)
PARTS = {
    "matrices": Part(("hidden",), partial(Dion, lr=0.05, rank_fraction=0.5)),
    "rest": Part(("vector",), partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)),
}
N_STEPS = 8


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))


def make_optimizer(model):
    return build_optimizer(model, PARTS)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 7, 6, generator=generator).unbind() for _ in range(N_STEPS)]


def loss_of(model, batch):
    return mse_loss(model(batch[0]), batch[1][:, :3])


def train(model, step, some_batches):
    for batch in some_batches:
        model.zero_grad()
        loss_of(model, batch).backward()
        step()


def assert_same_weights(first, second):
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def through_a_file(value):
    """Saved and loaded like a checkpoint, which rejects everything but tensors and plain values."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_steps_are_bit_identical_to_the_parts_alone():
    together, alone = make_model(), make_model()
    combined = make_optimizer(together)
    matrices = [p for name, p in alone.named_parameters() if name in ("0.weight", "3.weight")]
    vectors = [p for p in alone.parameters() if p.ndim == 1]
    parts = [
        Dion(matrices, lr=0.05, rank_fraction=0.5),
        torch.optim.AdamW(vectors, lr=0.01, weight_decay=0.0),
    ]
    train(together, combined.step, batches())
    train(alone, lambda: [part.step() for part in parts], batches())
    assert_same_weights(together, alone)


def test_groups_are_the_parts_own_dictionaries():
    combined = make_optimizer(make_model())
    own = [group for part in combined.parts.values() for group in part.param_groups]
    assert all(a is b for a, b in zip(combined.param_groups, own, strict=True))


def test_a_scheduler_moves_the_rates_of_the_parts():
    combined = make_optimizer(make_model())
    scheduler = SCHEDULE.scheduler(combined, N_STEPS)
    for step in range(N_STEPS):
        multiplier = SCHEDULE.multiplier(step, N_STEPS)
        rates = [part.param_groups[0]["lr"] for part in combined.parts.values()]
        assert rates == [0.05 * multiplier, 0.01 * multiplier]
        combined.step()
        scheduler.step()


def test_the_closure_runs_once_with_gradients_and_its_loss_is_returned():
    model, batch = make_model(), batches()[0]
    combined = make_optimizer(model)
    losses = []

    def closure():
        combined.zero_grad()
        losses.append(loss_of(model, batch))
        losses[-1].backward()
        return losses[-1]

    assert combined.step(closure) is losses[0]
    assert len(losses) == 1
    with_closure = copy.deepcopy(model)

    model = make_model()
    train(model, make_optimizer(model).step, [batch])
    assert_same_weights(model, with_closure)


def test_zero_grad_reaches_every_parameter():
    model = make_model()
    combined = make_optimizer(model)
    loss_of(model, batches()[0]).backward()
    combined.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_step_hooks_run_once_a_step():
    combined, calls = make_optimizer(make_model()), []
    combined.register_step_pre_hook(lambda *args: calls.append("before"))
    combined.register_step_post_hook(lambda *args: calls.append("after"))
    combined.step()
    assert calls == ["before", "after"]


def test_state_reads_and_writes_the_parts():
    model = make_model()
    combined = make_optimizer(model)
    weight, bias = model[0].weight, model[0].bias
    assert weight not in combined.state
    assert len(combined.state) == 0
    train(model, combined.step, batches()[:1])
    assert set(combined.state) == set(model.parameters())
    assert combined.state[weight] is combined.parts["matrices"].state[weight]
    combined.state[bias] = {"exp_avg": torch.zeros(5)}
    assert combined.parts["rest"].state[bias]["exp_avg"].any().item() is False
    del combined.state[bias]
    assert bias not in combined.parts["rest"].state


@pytest.mark.parametrize("n_before", [0, 1, 5])
def test_resuming_from_a_checkpoint_continues_bit_identically(n_before):
    """Weights, state and the scheduler's learning rates; also from before the first step."""
    whole, interrupted = make_model(), make_model()
    optimizers = {}
    for model in (whole, interrupted):
        optimizer = make_optimizer(model)
        optimizers[model] = optimizer, SCHEDULE.scheduler(optimizer, N_STEPS)

    def both(model):
        return lambda: [each.step() for each in optimizers[model]]

    train(whole, both(whole), batches())
    train(interrupted, both(interrupted), batches()[:n_before])
    saved = through_a_file(
        [part.state_dict() for part in (interrupted, *optimizers[interrupted])],
    )
    resumed = make_model()
    optimizer = make_optimizer(resumed)
    optimizers[resumed] = optimizer, SCHEDULE.scheduler(optimizer, N_STEPS)
    for part, state in zip((resumed, *optimizers[resumed]), saved, strict=True):
        part.load_state_dict(state)
    train(resumed, both(resumed), batches()[n_before:])
    assert_same_weights(whole, resumed)


def test_loading_keeps_groups_shared_with_the_parts():
    combined = make_optimizer(make_model())
    combined.load_state_dict(combined.state_dict())
    own = [group for part in combined.parts.values() for group in part.param_groups]
    assert all(a is b for a, b in zip(combined.param_groups, own, strict=True))


@pytest.mark.parametrize("saved", [{"state": {}, "param_groups": []}, {"parts": {"rest": {}}}])
def test_a_checkpoint_of_other_parts_is_refused(saved):
    with pytest.raises(ConfigError, match=r"the optimizer has matrices, rest"):
        make_optimizer(make_model()).load_state_dict(saved)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_a_copy_goes_on_alone(duplicate):
    """Copied with its model, like for a spawned process."""
    model = make_model()
    combined = make_optimizer(model)
    train(model, combined.step, batches()[:2])
    other_model, other = duplicate((model, combined))
    train(model, combined.step, batches()[2:])
    train(other_model, other.step, batches()[2:])
    assert_same_weights(model, other_model)


def test_no_group_can_be_added():
    combined = make_optimizer(make_model())
    with pytest.raises(ConfigError, match="matrices, rest"):
        combined.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_parts_may_not_share_a_parameter():
    weight = nn.Parameter(torch.zeros(1))
    parts = {name: torch.optim.SGD([weight]) for name in ("first", "second")}
    with pytest.raises(ValueError, match="more than one parameter group"):
        CombinedOptimizer(parts)


def test_gradient_scaling_skips_a_step_that_overflows():
    """AMP's scaler unscales the parts' gradients, and skips the step of all if one is infinite."""
    scaled, plain = make_model(), make_model()
    optimizer, scaler = make_optimizer(scaled), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(scaled, batches()[0])).backward()
    scaler.step(optimizer)
    scaler.update()
    train(plain, make_optimizer(plain).step, batches()[:1])
    assert_same_weights(scaled, plain)
    optimizer.zero_grad()
    scaler.scale(loss_of(scaled, batches()[1])).backward()
    scaled[0].bias.grad[0] = torch.inf
    scaler.step(optimizer)
    assert_same_weights(scaled, plain)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def training_step(self, batch, batch_idx):
        return loss_of(self.model, batch)

    def configure_optimizers(self):
        optimizer = make_optimizer(self.model)
        scheduler = SCHEDULE.scheduler(optimizer, N_STEPS)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def fit(directory, max_steps, resume=None):
    module = Module()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        default_root_dir=directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.1,
    )
    loader = torch.utils.data.DataLoader(batches()[:1], batch_size=None)
    trainer.fit(module, loader, ckpt_path=resume, weights_only=resume is not None)
    return trainer, module


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # Lightning's own
def test_lightning_trains_clips_and_resumes_as_a_plain_loop_does(tmp_path):
    """Automatic optimization on one batch against a plain loop, interrupted after 3 of 8 steps."""
    _, whole = fit(tmp_path, N_STEPS)
    plain = make_model()
    optimizer = make_optimizer(plain)
    scheduler = SCHEDULE.scheduler(optimizer, N_STEPS)
    in_order_of_groups = [p for group in optimizer.param_groups for p in group["params"]]

    def clipped_step():
        nn.utils.clip_grad_norm_(in_order_of_groups, 0.1)
        optimizer.step()
        scheduler.step()

    train(plain, clipped_step, N_STEPS * batches()[:1])
    assert_same_weights(whole.model, plain)

    trainer, _ = fit(tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "third.ckpt")
    _, resumed = fit(tmp_path, N_STEPS, resume=tmp_path / "third.ckpt")
    assert_same_weights(whole.model, resumed.model)
