"""The relaxation behind the policy search: expected weights and costs, their limits, the distance."""

from __future__ import annotations

import pytest
import torch

from lodestar.guiders.policies.relaxation import discretise, distance, options, relax, temperature
from lodestar.guiders.policies.weights_per_step import evaluations


def test_the_options_and_what_they_cost():
    weights = options(7.5)
    assert weights == (0.0, 1.0, 3.75, 7.5, 15.0)
    assert [evaluations(weight) for weight in weights] == [1, 1, 2, 2, 2]
    assert options(2.0) == (0.0, 1.0, 2.0, 4.0)  # s / 2 is the conditional prediction


def test_relaxed_weights_and_cost_are_expectations():
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = options(7.5)
    expected, cost = relax(logits, weights)
    for t in range(3):
        chances = [float(logits[t, j].exp() / logits[t].exp().sum()) for j in range(5)]
        assert float(expected[t]) == pytest.approx(sum(p * w for p, w in zip(chances, weights, strict=True)))
    chances = logits.softmax(1)
    assert float(cost) == pytest.approx(float((chances[:, :2].sum() + 2 * chances[:, 2:].sum()) / 6))


def test_certain_logits_are_the_discrete_policy():
    weights = options(7.5)
    logits = torch.full((4, 5), -500.0)
    for t, j in enumerate((3, 4, 1, 0)):
        logits[t, j] = 500.0
    expected, cost = relax(logits, weights)
    assert discretise(logits, weights) == tuple(expected.tolist()) == (7.5, 15.0, 1.0, 0.0)
    assert float(cost) == pytest.approx((2 + 2 + 1 + 1) / 8)


def test_the_distance_is_relative_and_per_image():
    target = torch.stack([torch.ones(3, 2, 2), 10 * torch.ones(3, 2, 2)])
    assert float(distance(target, target)) == 0
    assert float(distance(1.1 * target, target)) == pytest.approx(0.01)


def test_the_temperature_falls_from_1_to_a_tenth():
    assert [temperature(i, 3) for i in range(3)] == pytest.approx([1, 0.1**0.5, 0.1])
    assert temperature(0, 1) == 1
