"""Percent of the schedule, noise parametrisations, per-sample sums, and latents that are packed from several parts."""

from __future__ import annotations

import pytest
import torch

from lodestar.guiders.spaces import (
    Layout,
    cosine_per_sample,
    dot_per_sample,
    norm_per_sample,
    precise,
    reparametrise,
)

SHAPES = [(2, 8), (2, 4, 6), (2, 4, 6, 5), (2, 4, 3, 6, 5)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9])
def test_both_paths_hold_the_same_x0_and_the_same_noise(t):
    x0, noise, levels = random(2, 3, 4), random(2, 3, 4, seed=1), torch.full((2,), t)
    flow = (1 - t) * x0 + t * noise
    additive = x0 + t / (1 - t) * noise
    x, sigma = reparametrise(flow, levels, from_flow=True, to_flow=False)
    torch.testing.assert_close(x, additive)
    torch.testing.assert_close(sigma, levels / (1 - levels))
    back, level = reparametrise(x, sigma, from_flow=False, to_flow=True)
    torch.testing.assert_close(back, flow)
    torch.testing.assert_close(level, levels)


def test_pure_noise_of_a_flow_model_stays_finite():
    x, sigma = reparametrise(random(2, 3, 4), torch.ones(2), from_flow=True, to_flow=False)
    assert x.isfinite().all() and sigma.isfinite().all() and (sigma > 1000).all()


def test_equal_paths_are_left_alone():
    x, sigma = random(2, 3), torch.ones(2)
    for flow in (False, True):
        assert reparametrise(x, sigma, flow, flow) == (x, sigma)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_run_over_all_dimensions_but_the_batch(shape):
    a, b = random(*shape), random(*shape, seed=1)
    for i in range(len(a)):
        p, q = a[i].double().flatten(), b[i].double().flatten()
        assert dot_per_sample(a.flatten(1), b.flatten(1))[i].item() == pytest.approx((p @ q).item())
        assert norm_per_sample(a, Layout())[i].item() == pytest.approx(p.norm().item())
        assert cosine_per_sample(a, b, Layout())[i].item() == pytest.approx((p @ q / p.norm() / q.norm()).item())


def test_sums_of_half_precision_are_made_in_float64():
    x = torch.full((1, 70_000), 10.0, dtype=torch.float16)  # the sum of squares is beyond float16
    assert precise(x).dtype == torch.float64
    assert norm_per_sample(x, Layout()).item() == pytest.approx(10 * 70_000**0.5)


def test_cosine_with_nothing_is_zero():
    assert cosine_per_sample(torch.zeros(2, 3), torch.ones(2, 3), Layout()).tolist() == [0, 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_split_and_join_give_the_tensor_back(shape, dtype):
    x = random(*shape, dtype=dtype)
    for shapes in (None, [shape]):
        layout = Layout.of(shapes)
        (part,) = layout.split(x)
        joined = layout.join([precise(part)], x)
        assert part.shape == (2, x[0].numel()) and joined.dtype == dtype and joined.equal(x)


def test_a_packed_latent_splits_into_its_parts():
    video, sound = random(2, 4, 3, 6, 5), random(2, 8, 10, seed=1)
    packed = torch.cat([video.flatten(1), sound.flatten(1)], dim=1).unsqueeze(1)
    layout = Layout.of([video.shape, sound.shape])
    parts = layout.split(packed)
    assert parts[0].equal(video.flatten(1)) and parts[1].equal(sound.flatten(1))
    assert layout.join(parts, packed).equal(packed)
    torch.testing.assert_close(norm_per_sample(packed, layout), norm_per_sample(packed, Layout()))
