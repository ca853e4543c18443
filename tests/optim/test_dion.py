"""Dion against its definition in NumPy, its exact properties at full rank, and its memory."""

import io

import numpy as np
import pytest
import scipy.linalg
import torch
from operations import Operations
from torch import nn

from nerve.errors import ConfigError
from nerve.optim import Dion
from nerve.optim.dion import orthonormal, power_step


def matrix(n_out, n_in, seed=0, dtype=torch.float64):
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_singular_values(values, n_out, n_in):
    """A matrix with the given singular values and generic singular vectors."""
    left, _ = np.linalg.qr(matrix(n_out, len(values), seed=1).numpy())
    right, _ = np.linalg.qr(matrix(n_in, len(values), seed=2).numpy())
    return torch.from_numpy((left * np.asarray(values)) @ right.T)


def updates_of(gradients, **options):
    """The weight's change at each step divided by the learning rate, starting from a weight of
    zero."""
    weight = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = Dion([weight], lr=1.0, weight_decay=0.0, **options)
    changes = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        changes.append((before - weight.detach()).numpy())
    return changes, optimizer.state[weight]


@pytest.mark.parametrize("shape", [(6, 4), (3, 5)])
def test_steps_follow_the_definition_with_error_feedback(shape):
    """Five steps in float64 with decay, using Gram-Schmidt and a loop over the columns of V."""
    lr, momentum, decay = 0.1, 0.9, 0.05
    n_out, n_in = shape
    start = matrix(*shape, seed=3)
    weight = nn.Parameter(start.clone())
    optimizer = Dion([weight], lr, momentum, rank_fraction=0.5, weight_decay=decay)
    expected, buffer, right = start.numpy().copy(), np.zeros(shape), None
    for step in range(5):
        gradient = matrix(*shape, seed=10 + step)
        if right is None:  # The start is random; only what follows from it is defined.
            drawn = torch.randn(n_in, 2, generator=torch.Generator().manual_seed(0))
            right = drawn.double().numpy()
        buffer = buffer + gradient.numpy()
        projected = buffer @ right
        first = projected[:, 0] / np.linalg.norm(projected[:, 0])
        second = projected[:, 1] - first * (first @ projected[:, 1])
        left = np.stack([first, second / np.linalg.norm(second)], axis=1)
        unscaled = buffer.T @ left
        buffer = buffer - (1 - momentum) * left @ unscaled.T
        right = np.stack([column / np.linalg.norm(column) for column in unscaled.T], axis=1)
        expected = (1 - lr * decay) * expected - lr * np.sqrt(n_out / n_in) * left @ right.T
        weight.grad = gradient
        optimizer.step()
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(optimizer.state[weight]["momentum"].numpy(), buffer, atol=1e-13)


def test_error_feedback_keeps_what_the_update_left_out():
    """The part spanned by P decays by μ, the rest is kept: M = μ P Pᵀ B + (I - P Pᵀ) B."""
    buffer = matrix(7, 5)
    left, unscaled, _ = power_step(buffer, matrix(5, 2, seed=1))
    kept = buffer - 0.1 * left @ unscaled.T
    projector = left @ left.T
    torch.testing.assert_close(projector @ kept, 0.9 * projector @ buffer, rtol=0, atol=1e-14)
    rest = torch.eye(7, dtype=torch.float64) - projector
    torch.testing.assert_close(rest @ kept, rest @ buffer, rtol=0, atol=1e-14)


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8, 1e15])
def test_orthonormal_columns_are_those_of_householder_reflections(condition):
    """In float32, in batches: Q of SciPy's float64 decomposition, signed so that R's diagonal is
    positive."""
    values = np.geomspace(1.0, 1.0 / condition, 8)
    columns = torch.stack([with_singular_values(values, 20, 8), matrix(20, 8)]).float()
    q, r = np.linalg.qr(columns.double().numpy())
    expected = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None]
    np.testing.assert_allclose(orthonormal(columns).numpy(), expected, rtol=0, atol=1e-7)


def test_columns_that_depend_on_others_are_orthogonal_to_them():
    """A repeated column, a sum of two, and one of zeros, which stays so."""
    columns = matrix(9, 6, dtype=torch.float32)
    columns[:, 2], columns[:, 3], columns[:, 4] = columns[:, 0], columns[:, 0] + columns[:, 1], 0.0
    q = orthonormal(columns).double()
    gram = q.T @ q
    off_diagonal = gram - gram.diagonal().diag()
    assert off_diagonal.abs().max() < 1e-6
    lengths = gram.diagonal().sqrt()
    assert lengths[[0, 1, 5]].tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert lengths[4] == 0.0
    assert lengths.max() < 1 + 1e-6


def test_weights_of_one_shape_are_updated_together_as_each_on_its_own():
    """Three shapes; the index of each weight is the same in both optimizers."""
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (4, 6), (6, 4)]

    def trained(together):
        weights = [nn.Parameter(matrix(*shape, seed=i)) for i, shape in enumerate(shapes)]
        optimizer = Dion(weights, lr=0.1, rank_fraction=0.5)
        for step in range(4):
            gradients = [matrix(*shape, seed=10 * step + i) for i, shape in enumerate(shapes)]
            rounds = [range(len(shapes))] if together else [[i] for i in range(len(shapes))]
            for some in rounds:
                for i, weight in enumerate(weights):
                    weight.grad = gradients[i] if i in some else None
                optimizer.step()
        return weights

    for together, alone in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-13)


def test_more_weights_of_a_shape_need_no_more_operations():
    def n_operations(n):
        weights = [nn.Parameter(matrix(6, 4, seed=i)) for i in range(n)]
        optimizer = Dion(weights)
        for weight in weights:
            weight.grad = torch.ones(6, 4, dtype=torch.float64)
        optimizer.step()
        with Operations() as operations:
            optimizer.step()
        return operations.n

    assert n_operations(8) == n_operations(2)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_at_full_rank_the_buffer_is_plain_momentum(shape):
    """P Rᵀ = B for any invertible V, so M_t = Σ_s μ^(t-s+1) G_s exactly, from the first step."""
    gradients = [matrix(*shape, seed=seed) for seed in range(4)]
    _, state = updates_of(gradients, momentum=0.8, rank_fraction=1.0)
    expected = sum(0.8 ** (4 - s) * gradient for s, gradient in enumerate(gradients))
    torch.testing.assert_close(state["momentum"], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_at_full_rank_a_repeated_gradient_converges_to_its_polar_factor(shape):
    """Singular values 8, 4, 2, 1: the error falls by 1/4 per step; the first update is not yet
    converged."""
    gradient = with_singular_values([8.0, 4.0, 2.0, 1.0], *shape)
    changes, _ = updates_of([gradient] * 30, momentum=0.9, rank_fraction=1.0)
    polar, _ = scipy.linalg.polar(gradient.numpy())
    polar *= np.sqrt(shape[0] / shape[1])
    errors = [np.linalg.norm(change - polar) for change in changes]
    assert errors[0] > 0.1
    assert errors[29] < 1e-12
    assert errors[9] / errors[8] == pytest.approx(0.25, rel=0.05)


def test_below_full_rank_a_repeated_gradient_takes_its_leading_directions():
    """Rank 2 of 4, with μ so close to 1 that B keeps its direction: U₂ V₂ᵀ of the truncated SVD."""
    gradient = with_singular_values([8.0, 4.0, 0.2, 0.1], 5, 4)
    changes, _ = updates_of([gradient] * 20, momentum=1 - 1e-12, rank_fraction=0.5)
    left, _, right = np.linalg.svd(gradient.numpy())
    leading = np.sqrt(5 / 4) * left[:, :2] @ right[:2]
    np.testing.assert_allclose(changes[-1], leading, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fraction", [0.2, 0.6, 1.0])
def test_every_update_has_the_frobenius_norm_of_an_orthonormal_one(fraction):
    """√r before the scale √(m/n), converged or not: P is orthonormal and V has unit columns."""
    changes, state = updates_of([matrix(8, 5, seed=s) for s in range(3)], rank_fraction=fraction)
    rank = state["right"].shape[1]
    norms = [np.linalg.norm(change) for change in changes]
    assert norms == pytest.approx([np.sqrt(rank * 8 / 5)] * 3, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_update_does_not_depend_on_the_gradients_scale(scale):
    gradients = [matrix(5, 4, seed=s, dtype=torch.float32) for s in range(3)]
    changes, _ = updates_of(gradients)
    scaled, _ = updates_of([scale * gradient for gradient in gradients])
    np.testing.assert_allclose(scaled, changes, rtol=0, atol=2e-6)


def test_a_gradient_below_the_rank_moves_only_its_own_direction():
    """Rank 1 with r = 4: the three columns of R that are rounding add nothing to u vᵀ."""
    gradient = with_singular_values([1e-3], 6, 6).float()
    changes, state = updates_of([gradient] * 3, rank_fraction=4 / 6)
    polar = gradient.numpy() / np.linalg.norm(gradient.numpy())
    for change in changes:
        np.testing.assert_allclose(change, polar, rtol=0, atol=1e-5)
    assert torch.linalg.matrix_rank(state["right"]) == 4


def test_a_zero_gradient_moves_nothing_and_the_next_one_is_seen():
    """Also if the next gradient avoids the first outputs, as with dead neurons."""
    gradient = torch.zeros(6, 4, dtype=torch.float64)
    gradient[4:] = matrix(2, 4)
    changes, _ = updates_of([torch.zeros_like(gradient), gradient], rank_fraction=0.5)
    assert not changes[0].any()
    np.testing.assert_allclose(np.linalg.norm(changes[1]), np.sqrt(2 * 6 / 4), rtol=1e-12)


def test_a_quadratic_of_higher_rank_than_the_updates_is_minimised():
    """½‖W - W*‖² with rank W* = 4 at r = 1: error feedback reaches every direction in turn."""
    target = with_singular_values([2.0, 1.5, 1.0, 0.5], 6, 5)
    weight = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    optimizer = Dion([weight], momentum=0.5, rank_fraction=0.2, weight_decay=0.0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        optimizer.zero_grad()
        (0.5 * (weight - target).square().sum()).backward()
        optimizer.step()
    assert torch.linalg.matrix_norm(weight.detach() - target) < 0.005
    assert torch.linalg.matrix_norm(target) > 2.7


@pytest.mark.parametrize(
    ("shape", "fraction", "rank"), [((64, 32), 0.25, 8), ((32, 64), 1 / 16, 2), ((9, 7), 0.01, 1)]
)
def test_the_state_holds_the_momentum_and_one_thin_factor(shape, fraction, rank):
    """m·n + n·r float32 numbers, r = round(fraction · min(m, n)) and at least 1."""
    _, state = updates_of([matrix(*shape, dtype=torch.float32)], rank_fraction=fraction)
    assert sum(tensor.numel() for tensor in state.values()) == shape[0] * shape[1] + shape[1] * rank
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_no_global_random_state_is_used_and_runs_repeat():
    """Equal matrices at two positions start from different factors; a second run from the same
    ones."""
    gradient = matrix(6, 4, dtype=torch.float32)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        weights = [nn.Parameter(torch.zeros(6, 4)) for _ in range(2)]
        optimizer = Dion(weights, rank_fraction=0.5)
        for weight in weights:
            weight.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        results.append([weight.detach().clone() for weight in weights])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_continues_bit_identically_at_full_precision(dtype):
    """Also for bfloat16 weights, whose float32 momentum torch would round on loading."""
    gradients = [matrix(6, 4, seed=s, dtype=dtype) for s in range(6)]

    def run(weight, optimizer, some):
        for gradient in some:
            weight.grad = gradient.clone()
            optimizer.step()

    whole = nn.Parameter(torch.ones(6, 4, dtype=dtype))
    optimizer = Dion([whole], rank_fraction=0.5)
    run(whole, optimizer, gradients[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = nn.Parameter(whole.detach().clone())
    run(whole, optimizer, gradients[3:])

    file.seek(0)
    resuming = Dion([resumed], rank_fraction=0.5)
    resuming.load_state_dict(torch.load(file, weights_only=True))
    assert {t.dtype for t in resuming.state[resumed].values()} == {torch.float32}
    run(resumed, resuming, gradients[3:])
    assert torch.equal(whole, resumed)


def test_a_weight_without_gradient_is_left_alone():
    """No decay and no state; its index still counts for the initialization of the weights after
    it."""
    idle, weight = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = Dion([idle, weight], weight_decay=0.5)
    weight.grad = matrix(4, 3, dtype=torch.float32)
    optimizer.step()
    assert torch.equal(idle, torch.ones(4, 3))
    assert set(optimizer.state) == {weight}


def test_the_closure_runs_with_gradients_and_its_loss_is_returned():
    weight = nn.Parameter(matrix(4, 3))
    optimizer = Dion([weight])

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_fraction": 0.0}, r"rank_fraction must be in \(0, 1\]; got 0\.0"),
        ({"rank_fraction": 1.5}, "rank_fraction"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"lr": -0.1}, "lr must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Dion([nn.Parameter(torch.zeros(2, 2))], **options)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_only_matrices_are_taken(shape):
    with pytest.raises(ConfigError, match="matrices only"):
        Dion([nn.Parameter(torch.zeros(shape))])
