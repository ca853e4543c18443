"""The optimizers of pytorch-optimizer follow their papers, step by step in NumPy (float64)."""

import io

import numpy as np
import pytest
import torch
from pytorch_optimizer import SOAP, Shampoo
from torch import nn

SHAPES = [(5, 3), (3, 5)]


def gradients(shape, n_steps):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n_steps, *shape, generator=generator, dtype=torch.float64)


def weights_after(optimizer, weight, some_gradients):
    """The weight after each step; the optimizer must not change the gradient."""
    weights = []
    for gradient in some_gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(weight.grad, gradient)
        weights.append(weight.detach().numpy().copy())
    return weights


def inverse_fourth_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(values**-0.25) @ vectors.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("interval", [1, 3])
def test_shampoo_is_that_of_the_paper(shape, interval):
    """Gupta, Koren & Singer 2018, Algorithm 1: W -= lr · L^(-1/4) G R^(-1/4), L = εI + Σ G Gᵀ.

    The library computes the roots at every multiple of `interval` and takes them as zero before
    the first: with 3, the first two steps only decay the weight.
    """
    lr, decay, epsilon = 0.3, 0.1, 1e-4
    weight = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = Shampoo(
        [weight],
        lr=lr,
        weight_decay=decay,
        weight_decouple=True,
        preconditioning_compute_steps=interval,
        matrix_eps=epsilon,
    )
    steps = gradients(shape, 7)
    actual = weights_after(optimizer, weight, steps)
    left, right = epsilon * np.eye(shape[0]), epsilon * np.eye(shape[1])
    left_root, right_root = np.zeros_like(left), np.zeros_like(right)
    expected = np.ones(shape)
    for step, gradient in enumerate(steps.numpy(), start=1):
        left += gradient @ gradient.T
        right += gradient.T @ gradient
        if step % interval == 0:
            left_root, right_root = inverse_fourth_root(left), inverse_fourth_root(right)
        expected = (1 - lr * decay) * expected - lr * left_root @ gradient @ right_root
        np.testing.assert_allclose(actual[step - 1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_soap_is_that_of_the_paper(shape):
    """Vyas et al. 2024, Algorithm 3: Adam in the eigenbases of Shampoo's L and R.

    The first gradient only starts the bases, as in the authors' code; each second step from then on
    refines them by one power iteration and a QR decomposition.
    """
    lr, beta1, beta2, decay, epsilon = 0.1, 0.9, 0.8, 0.05, 1e-8
    weight = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = SOAP(
        [weight],
        lr=lr,
        betas=(beta1, beta2),
        weight_decay=decay,
        precondition_frequency=2,
        eps=epsilon,
    )
    steps = gradients(shape, 8)
    [untouched] = weights_after(optimizer, weight, steps[:1])
    np.testing.assert_array_equal(untouched, np.ones(shape))
    first = steps[0].numpy()
    statistics = [(1 - beta2) * first @ first.T, (1 - beta2) * first.T @ first]
    # Any eigenbases will do, and those of a null space are arbitrary: we start from the library's.
    left, right = (basis.numpy().copy() for basis in optimizer.state[weight]["Q"])
    for matrix, basis in zip(statistics, (left, right), strict=True):
        values = np.linalg.eigvalsh(matrix)[::-1]
        np.testing.assert_allclose(basis.T @ matrix @ basis, np.diag(values), rtol=0, atol=1e-13)
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), rtol=0, atol=1e-13)
    actual = [untouched, *weights_after(optimizer, weight, steps[1:])]

    mean, variance, expected = np.zeros(shape), np.zeros(shape), np.ones(shape)
    for step, gradient in enumerate(steps[1:].numpy(), start=1):
        mean = beta1 * mean + (1 - beta1) * gradient
        variance = beta2 * variance + (1 - beta2) * (left.T @ gradient @ right) ** 2
        corrected_mean = left.T @ mean @ right / (1 - beta1**step)
        corrected_deviation = np.sqrt(variance / (1 - beta2**step))
        # The library adds epsilon to the deviation before its bias is corrected.
        floor = epsilon / np.sqrt(1 - beta2**step)
        update = left @ (corrected_mean / (corrected_deviation + floor)) @ right.T
        expected = (1 - lr * decay) * (expected - lr * update)
        # The library's QR is in float32.
        np.testing.assert_allclose(actual[step], expected, rtol=0, atol=1e-6)

        for matrix, outer in zip(
            statistics, (gradient @ gradient.T, gradient.T @ gradient), strict=True
        ):
            matrix *= beta2
            matrix += (1 - beta2) * outer
        if step % 2 == 0:
            left, order = refined(statistics[0], left)
            variance = variance[order]
            right, order = refined(statistics[1], right)
            variance = variance[:, order]


def refined(statistic, basis):
    """One power iteration from `basis`, its columns sorted by eigenvalue, and their new order."""
    order = np.argsort(-np.diag(basis.T @ statistic @ basis))
    return np.linalg.qr(statistic @ basis[:, order])[0], order


@pytest.mark.parametrize(
    "build",
    [
        lambda weight: SOAP([weight], lr=0.1, precondition_frequency=2),
        lambda weight: Shampoo([weight], lr=0.1, preconditioning_compute_steps=2),
    ],
    ids=["soap", "shampoo"],
)
def test_a_checkpoint_loads_with_weights_only_and_continues_bit_identically(build):
    steps = gradients((4, 3), 7).float()
    whole = nn.Parameter(torch.ones(4, 3))
    optimizer = build(whole)
    weights_after(optimizer, whole, steps[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = nn.Parameter(whole.detach().clone())
    weights_after(optimizer, whole, steps[3:])
    file.seek(0)
    resuming = build(resumed)
    resuming.load_state_dict(torch.load(file, weights_only=True))
    weights_after(resuming, resumed, steps[3:])
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("optimizer_class", [SOAP, Shampoo])
def test_no_global_random_state_is_used(optimizer_class):
    weight = nn.Parameter(torch.ones(4, 3))
    before = torch.get_rng_state()
    weights_after(optimizer_class([weight], lr=0.1), weight, gradients((4, 3), 3).float())
    assert torch.equal(torch.get_rng_state(), before)
