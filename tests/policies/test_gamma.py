"""Adaptive Guidance's criterion: gamma, and the spaces in which it is measured."""

from __future__ import annotations

import pytest
import torch

from lodestar.guiders.policies.adaptive import gamma, in_space
from lodestar.guiders.spaces import Layout


@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 6, 5), (2, 4, 3, 6, 5)])
def test_gamma_is_the_cosine_of_whole_samples(shape):
    generator = torch.Generator().manual_seed(0)
    c, u = (torch.randn(shape, generator=generator) for _ in range(2))
    values = gamma(c, u, Layout())
    torch.testing.assert_close(values, torch.cosine_similarity(c.double().flatten(1), u.double().flatten(1), dim=1))
    assert values.dtype == torch.float64 and values.shape == (len(c),)
    torch.testing.assert_close(gamma(3.7 * c, 0.01 * u, Layout()), values, atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.cat([gamma(a[None], b[None], Layout()) for a, b in zip(c, u, strict=True)]), values)
    for other, limit in ((c, 1), (5 * c, 1), (-c, -1)):
        found = gamma(c, other, Layout())
        assert found.abs().max() <= 1 and (found - limit).abs().max() < 1e-12
    assert torch.equal(gamma(c, c, Layout()), torch.ones(len(c), dtype=torch.float64))


def test_gamma_of_a_packed_latent_is_one_number():
    c, u = torch.randn(2, 1, 30), torch.randn(2, 1, 30)
    torch.testing.assert_close(gamma(c, u, Layout((20, 10))), gamma(c, u, Layout()))


@pytest.mark.parametrize("flow", [False, True])
def test_spaces_of_a_known_point(flow):
    """x = a x0 + s eps gives back eps, and the velocity that the definition names."""
    x0, eps = (torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    level = torch.tensor([0.3, 0.9] if flow else [0.3, 12.0], dtype=torch.float64)
    s = level.reshape(-1, 1, 1)
    x = (1 - s) * x0 + s * eps if flow else x0 + s * eps
    angle = torch.atan(s)
    velocity = eps - x0 if flow else angle.cos() * eps - angle.sin() * x0
    assert in_space("denoised", x0, x, level, flow) is x0
    torch.testing.assert_close(in_space("noise", x0, x, level, flow), eps)
    torch.testing.assert_close(in_space("velocity", x0, x, level, flow), velocity)


@pytest.mark.parametrize("flow", [False, True])
def test_gamma_is_near_1_in_noise_space_where_noise_is_high(flow):
    """The spec's pitfall: both noises are mostly x, whatever the predictions are."""
    c, u, noise = (torch.randn(1, 400, generator=torch.Generator().manual_seed(i)) for i in range(3))
    level = torch.tensor([0.999 if flow else 100.0])
    x = (1 - level) * c + level * noise if flow else c + level * noise
    assert gamma(*(in_space("noise", d, x, level, flow) for d in (c, u)), Layout()) > 0.999
    assert abs(gamma(c, u, Layout())) < 0.2
