"""PSLD's loss and step, written out by hand, without a host."""

from __future__ import annotations

import pytest
import torch
from restoration_tools import random

from lodestar.guiders.restoration.operators import Downscale
from lodestar.guiders.restoration.psld import loss, update
from lodestar.guiders.spaces import Level, level_of

OPERATOR, OMEGA, GAMMA = Downscale(2), 0.7, 0.07


def toy():
    """Linear decoder and encoder [n, m] between 12 latents and pictures of 8x6."""
    return random(12, 3 * 8 * 6) / 4, random(3 * 8 * 6, 12, seed=1) / 4


def test_the_loss_and_its_gradient_by_hand():
    """z0 = tanh(z W): the chain rule through denoiser, decoder, operator, and encoder."""
    decoder, encoder = toy()
    weights, z, y = random(12, 12, seed=2), random(2, 12, seed=3).requires_grad_(), random(1, 3, 4, 3, seed=4)
    estimate = torch.tanh(z @ weights)
    values, residual = loss(
        estimate, lambda z: (z @ decoder).reshape(-1, 3, 8, 6), lambda x: x.flatten(1) @ encoder, OPERATOR, y, OMEGA, GAMMA
    )
    (found,) = torch.autograd.grad(values.sum(), z)
    matrix = OPERATOR.apply(torch.eye(144, dtype=torch.float64).reshape(144, 3, 8, 6)).flatten(1)  # [144, 36]
    for row in range(2):
        z0 = torch.tanh(z[row].detach() @ weights)
        picture = z0 @ decoder
        miss = picture @ matrix - y.flatten()
        unglued = (y.flatten() @ matrix.T + picture - picture @ matrix @ matrix.T) @ encoder - z0
        assert float(values[row].detach()) == pytest.approx(float(OMEGA * miss.norm() + GAMMA * unglued.norm()), rel=1e-10)
        through = decoder - decoder @ matrix @ matrix.T
        by_z0 = OMEGA * decoder @ matrix @ miss / miss.norm() + GAMMA * (through @ encoder - torch.eye(12)) @ unglued / unglued.norm()
        torch.testing.assert_close(found[row], weights @ ((1 - z0**2) * by_z0))
        torch.testing.assert_close(residual[row].flatten(), miss)


def test_without_gluing_nothing_is_encoded():
    decoder, _ = toy()
    values, _ = loss(random(1, 12), lambda z: (z @ decoder).reshape(-1, 3, 8, 6), None, OPERATOR, random(1, 3, 4, 3), 1.0, 0.0)
    assert values.shape == (1,)


def test_the_gradient_of_a_perfect_estimate_is_finite():
    estimate = random(1, 3, 8, 6).requires_grad_()
    values, _ = loss(estimate, lambda z: z, lambda x: x, OPERATOR, OPERATOR.apply(estimate).detach(), 1.0, 0.1)
    assert torch.autograd.grad(values.sum(), estimate)[0].isfinite().all()


# --- the step --------------------------------------------------------------------------------------------------------


def ddim(x, denoised, now: Level, then: Level, noise_from):
    """x' = a' D + s' eps, where eps belongs to ``noise_from``."""
    return then.a * denoised + then.s * (x - now.a * noise_from) / now.s


@pytest.mark.parametrize("own_noise", [True, False])
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_a_ddim_step_ends_at_the_step_minus_the_gradient(own_noise, flow, last):
    """In the authors' variables z = x / sqrt(a^2 + s^2), whose gradient is sqrt(a^2 + s^2) times that of x."""
    now, then = level_of(0.8, flow), level_of(0.0 if last else 0.5, flow)
    x, denoised, uncond, gradient = (random(2, 4, 3, 3, seed=i) for i in range(4))
    value = torch.tensor([1e6, 1e6], dtype=torch.float64)
    guided = denoised + update(gradient, value, now, then, 50, own_noise)
    plain = ddim(x, denoised, now, then, denoised if own_noise else uncond)
    moved = ddim(x, guided, now, then, guided if own_noise else uncond)
    radii = [(level.a**2 + level.s**2) ** 0.5 for level in (now, then)]
    torch.testing.assert_close(moved / radii[1], plain / radii[1] - 1000 / 50 * radii[0] * gradient)


def test_the_step_is_no_longer_than_to_a_loss_of_zero():
    """x' - x'_plain = -L / |g|^2 g, for each row."""
    gradient, value = random(2, 4, 3, 3), torch.tensor([0.5, 1e9], dtype=torch.float64)
    now, then = level_of(0.8, False), level_of(0.5, False)
    moved = update(gradient, value, now, then, 50, False)
    torch.testing.assert_close(moved[0], -0.5 * gradient[0] / gradient[0].square().sum())
    assert moved[1].norm() > 10 * moved[0].norm()


@pytest.mark.parametrize("next_sigma", [0.8, 1.0])
def test_steps_that_lead_nowhere_are_left_alone(next_sigma):
    gradient = random(1, 4, 3, 3)
    assert not update(gradient, torch.ones(1), level_of(0.8, False), level_of(next_sigma, False), 20, True).any()
