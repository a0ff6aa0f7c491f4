"""Rules on a MODEL: what attach adds to a clone, and that detach takes all of it away."""

from __future__ import annotations

import pytest
import tools
import torch
from tools import attach, close, empty_latent, guided, pag, sample, tiny

from lodestar.guiders.engine.attach import detach
from lodestar.guiders.engine.plan import plan_of
from lodestar.guiders.engine.wrappers import WRAPPERS
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance


def run(model):
    return sample(model, steps=3, latent=empty_latent(model, 1, 8))


def test_attaching_does_not_change_the_original():
    model = tiny("unet")
    plain = run(model)
    one = attach(model, APG())
    before = run(one)
    two, three = attach(one, pag(model)), attach(one, pag(model, scale=1.0))
    assert plan_of(model.model_options) is None
    assert [len(plan_of(m.model_options).rules) for m in (one, two, three)] == [1, 2, 2]
    assert not torch.equal(run(two), run(three))
    assert torch.equal(run(one), before)
    assert torch.equal(run(model), plain)


def test_wrappers_are_installed_once():
    model = tiny("unet")
    many = guided(model, *[pag(model)] * 3, APG(), Autoguidance(weak_model=tiny("unet", seed=7)))
    assert {kind: [len(found) for found in by_key.values()] for kind, by_key in many.wrappers.items()} == {kind: [1] for kind in WRAPPERS}


def everything(model):
    """A rule of every kind, a neutral term, and a weak model."""
    weak = Autoguidance(weak_model=tiny("unet", seed=7), scale=1.5)
    return [APG(), pag(model), pag(model, scale=0.0), weak, GuidanceInterval(end_percent=0.5)]


def parts(model):
    """What attach adds to, as plain values."""
    return model.model_options, model.wrappers, model.additional_models


def with_another_pack(model):
    """A model with a wrapper, a post-CFG function and an additional model of another pack."""
    clone = tools.with_wrapper(model, "outer_sample", lambda executor, *args, **more: executor(*args, **more))
    clone.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9)
    clone.set_additional_models("another pack", [tiny("unet", seed=3)])
    return clone


@pytest.mark.parametrize("prepare", [lambda model: model, with_another_pack], ids=["plain", "another pack"])
def test_detach_undoes_attach(prepare):
    model = prepare(tiny("unet"))
    plain, expected = run(model), parts(model.clone())
    attached = guided(attach(model), *everything(model))
    found = parts(detach(attached))
    assert found[:2] == expected[:2]
    assert {key: len(models) for key, models in found[2].items()} == {key: len(models) for key, models in expected[2].items()}
    assert not close(run(attached), plain, 1e-3)
    assert torch.equal(run(detach(attached)), plain)
    assert torch.equal(run(detach(model)), plain)


def test_detach_leaves_what_came_after_us():
    model = tiny("unet")
    after = with_another_pack(guided(model, *everything(model)))
    left = {"sampler_post_cfg_function": after.model_options["sampler_post_cfg_function"][-1:], "transformer_options": {}}
    assert detach(after).model_options == after.model_options | left
    assert close(run(detach(after)), run(with_another_pack(model)))
    again = guided(detach(after), pag(model))
    assert close(run(again), run(guided(with_another_pack(model), pag(model))))
