"""The decoupled step against closed forms, in float64 and without a host."""

from __future__ import annotations

import pytest
import torch
from restoration_tools import random

from lodestar.guiders.restoration.decoupled import FLOOR, precision, solve
from lodestar.guiders.restoration.operators import JPEG, Blur, Downscale, Grey, Inpaint, gaussian_kernel

SIZE = 8, 6
PIXELS = 3 * 8 * 6


def known(rows: int = 3) -> torch.Tensor:
    mask = torch.ones(1, 1, *SIZE)
    mask[..., :rows, 2:] = 0
    return mask


OPERATORS = {"inpaint": Inpaint(known()), "downscale": Downscale(2), "blur": Blur(gaussian_kernel(5, 1.0)), "grey": Grey()}


def itself(z):
    return z


def dense(operator):
    """A as a matrix [measurements, PIXELS]."""
    return operator.apply(torch.eye(PIXELS, dtype=torch.float64).reshape(PIXELS, 3, *SIZE)).flatten(1).T


def corrected(operator, y, start, rho, iterations=60, decode=itself):
    return solve(decode, operator, y, start, torch.as_tensor(rho, dtype=torch.float64).expand(len(start)), iterations)[0]


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_minimum_is_the_posterior_mean_of_a_gaussian_prior(name, flow):
    """x0 ~ N(m, 1), x_t = a x0 + s eps, y = A x0 + noise: E[x0 | x_t, y] by the joint precision of all three."""
    operator, noise, sigma = OPERATORS[name], 0.3, 0.7
    a, s = (1 - sigma, sigma) if flow else (1.0, sigma)
    mean, x_t, y = random(1, 3, *SIZE), random(1, 3, *SIZE, seed=1), operator.apply(random(1, 3, *SIZE, seed=2))
    matrix, variance = dense(operator), noise**2 + FLOOR
    joint = (1 + a * a / (s * s)) * torch.eye(PIXELS, dtype=torch.float64) + matrix.T @ matrix / variance
    right = mean.flatten() + a / (s * s) * x_t.flatten() + matrix.T @ y.flatten() / variance
    expected = torch.linalg.solve(joint, right).reshape(mean.shape)
    denoised = (mean + a / (s * s) * x_t) / (1 + a * a / (s * s))  # E[x0 | x_t]
    rho = precision(noise, 1.0, torch.tensor([sigma], dtype=torch.float64), flow)
    torch.testing.assert_close(corrected(operator, y, denoised, rho), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_linear_decoder_is_solved_exactly(name):
    """(J^T A^T A J + rho) z = J^T A^T y + rho D, where 20 latents make a picture."""
    operator, mixing = OPERATORS[name], random(20, PIXELS) / 4
    start, y = random(1, 20, seed=1), operator.apply(random(1, 3, *SIZE, seed=2))
    whole = dense(operator) @ mixing.T
    expected = torch.linalg.solve(whole.T @ whole + 0.1 * torch.eye(20), whole.T @ y.flatten() + 0.1 * start[0])
    found = corrected(operator, y, start, 0.1, decode=lambda z: (z @ mixing).reshape(-1, 3, *SIZE))
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-7)


def test_a_measurement_of_everything_without_noise_is_the_result():
    y = random(1, 3, *SIZE)
    rho = precision(0.0, 1.0, torch.tensor([5.0], dtype=torch.float64), False)
    torch.testing.assert_close(corrected(Inpaint(torch.ones(1, 1, *SIZE)), y, torch.zeros_like(y), rho, 1), y, rtol=0, atol=1e-3)


def test_a_mask_of_zeros_changes_nothing():
    start = random(2, 3, *SIZE)
    assert corrected(Inpaint(torch.zeros(1, 1, *SIZE)), torch.zeros_like(start), start, 0.1, 3).equal(start)


def test_rows_know_nothing_of_each_other():
    """Each has a measurement and a noise level of its own."""
    operator, start, y = OPERATORS["blur"], random(2, 3, *SIZE), random(2, 3, *SIZE, seed=1)
    rho = torch.tensor([0.1, 2.0], dtype=torch.float64)
    both = corrected(operator, y, start, rho, 3)
    for row in range(2):
        alone = corrected(operator, y[row : row + 1], start[row : row + 1], rho[row : row + 1], 3)
        torch.testing.assert_close(both[row], alone[0], rtol=0, atol=1e-12)


def test_every_iteration_comes_nearer():
    operator, start, y = OPERATORS["blur"], random(1, 3, *SIZE), random(1, 3, *SIZE, seed=1)
    errors = [float((operator.apply(corrected(operator, y, start, 1e-3, k)) - y).norm()) for k in range(1, 8)]
    assert errors == sorted(errors, reverse=True)


def test_jpeg_is_approached_through_its_steps():
    """The compressed start is not the measurement; after a few corrections nearly so."""
    original = random(1, 3, 16, 16).clamp(-1, 1) * 0.5
    y, start = JPEG(50).apply(original), torch.zeros_like(original)
    found = corrected(JPEG(50), y, start, 1e-4, 4)
    assert (JPEG(50).apply(found) - y).norm() < 0.3 * (JPEG(50).apply(start) - y).norm()


def test_the_prior_counts_more_at_the_end_and_with_noise():
    sigmas = torch.tensor([14.0, 1.0, 0.1])
    rho = precision(0.05, 1.0, sigmas, False)
    assert rho.tolist() == sorted(rho.tolist()) and (precision(0.1, 1.0, sigmas, False) > rho).all()
    torch.testing.assert_close(precision(0.05, 2.0, sigmas, False), rho / 2)
    torch.testing.assert_close(precision(0.05, 1.0, sigmas / (1 + sigmas), True), rho)
