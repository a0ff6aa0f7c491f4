"""The same guidance as without the engine, and neutral settings to the bit."""

from __future__ import annotations

import pytest
import tools
import torch
from tools import KINDS, close, counted, empty_latent, guided, pag, reference, sample, tiny

from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG

STEPS = 3


def small(model, batch: int = 1):
    return empty_latent(model, batch, 8)


def run(model, batch: int = 1, **more):
    return sample(model, steps=STEPS, latent=small(model, batch), **more)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_unfused_evaluations(kind, sampler, cfg):
    """Every prediction is the one that the host computes when it is asked for it alone."""
    model = tiny(kind)
    rules = [APG(momentum=0.0, norm_threshold=2.0), *tools.all_rules(kind)[1:]]
    result = run(guided(model, *rules), sampler=sampler, cfg=cfg)
    assert close(result, run(reference(model, *rules), sampler=sampler, cfg=cfg))
    assert not close(result, run(model, sampler=sampler, cfg=cfg), 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_momentum_over_a_run(kind):
    model = tiny(kind)
    assert close(run(guided(model, APG())), run(reference(model, APG())))


@pytest.mark.parametrize("kind", KINDS)
def test_neutral_settings_are_the_model_itself(kind):
    model = tiny(kind)
    main = guided(model, *tools.neutral_rules(kind), GuidanceInterval())
    with counted(model) as rows:
        assert torch.equal(run(main), run(model))
    assert rows == [2] * 2 * STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_its_window_a_rule_leaves_no_rounding(kind):
    model = tiny(kind)
    main = guided(model, APG(start_percent=1.0), pag(model, start_percent=1.0))
    assert torch.equal(run(main), run(model))
