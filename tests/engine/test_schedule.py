"""Which solver step asks for an evaluation: announced by a sampler, read off its loop, or off the noise level."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lodestar.guiders.engine.schedule import Position, nearest_step, window

LEVELS = [10.0, 5.0, 1.0, 0.0]


def test_window_is_read_from_the_models_schedule():
    model_sampling = SimpleNamespace(percent_to_sigma=lambda percent: 14.6 * (1 - percent))
    assert window(model_sampling, 0.0, 0.5) == (14.6, 7.3)


def test_a_sampler_without_a_loop_is_placed_by_its_noise_level():
    assert [nearest_step(LEVELS, sigma) for sigma in (20.0, 10.0, 7.0, 5.0, 2.0, 1.0, 0.5)] == [0, 0, 0, 1, 1, 2, 2]


def restarts_are_wrong():
    pytest.fail("nothing starts again here")


def test_a_sampler_that_announces_its_steps_may_count_downwards():
    """Its noise level says nothing, and no step looks like the start of another loop."""
    position, seen = Position(LEVELS), []
    with position.announced() as at_step:
        for index in (2, 1, 0):
            at_step(index)
            seen += [position.advance(torch.tensor([3.0]), restarts_are_wrong) for _ in range(2)]
    assert seen == [(2, True), (2, False), (1, True), (1, False), (0, True), (0, False)]
    assert position.advance(torch.tensor([5.0, 5.0]), restarts_are_wrong) == (1, False)  # by its noise level again


def advance_in_a_loop(position, order, restart):
    sigmas, seen = torch.tensor(LEVELS), []
    for i in order:
        seen.append(position.advance(sigmas[i : i + 1], restart))
    return seen


def test_a_loop_is_read_and_its_restart_noticed():
    position, restarts = Position(LEVELS), []
    seen = advance_in_a_loop(position, (0, 1, 1, 2, 0, 1), lambda: restarts.append(True))
    assert seen == [(0, True), (1, True), (1, False), (2, True), (0, True), (1, True)]
    assert restarts == [True]


def test_the_loop_of_another_schedule_is_not_ours():
    assert advance_in_a_loop(Position([10.0, 4.0, 0.0]), (0, 1, 2), restarts_are_wrong) == [(0, True), (0, False), (1, True)]
