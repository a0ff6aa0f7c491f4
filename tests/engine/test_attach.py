"""Rules on a MODEL: what attach adds to a clone, and that detach takes all of it away."""

from __future__ import annotations

import copy
import threading

import pytest
import tools
import torch
from conditioning_tools import windows
from tools import attach, close, empty_latent, guided, log_of, pag, sample, tiny

from lodestar.guiders.engine.attach import detach
from lodestar.guiders.engine.keys import PLAN, RUN
from lodestar.guiders.engine.plan import plan_of
from lodestar.guiders.engine.telemetry import Telemetry
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


def test_a_neutral_rule_has_no_place_among_the_wrappers():
    """Else a wrapper that leaves out evaluations, such as LazyCache's, would come before or after the rules because of it."""
    model = tiny("unet")

    def order(first):
        between = tools.with_wrapper(first, "predict_noise", lambda executor, *args, **more: executor(*args, **more))
        return list(attach(between, APG(norm_threshold=1.0)).wrappers["predict_noise"])

    assert len(order(model)) == 2
    assert order(attach(model, pag(model, scale=0.0))) == order(attach(model)) == order(model)


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


# --- packs that copy the options of a model deeply -------------------------------------------------------------------


def test_options_that_were_copied_deeply_are_those_of_the_same_plan():
    model = tiny("unet")
    attached = guided(model, *everything(model))
    expected = run(attached)
    copied = attached.clone()
    copied.model_options = copy.deepcopy(attached.model_options)
    assert torch.equal(run(copied), expected)
    assert log_of(attached) is log_of(copied)
    assert torch.equal(run(guided(copied, pag(model))), run(guided(attached, pag(model))))
    assert detach(copied).model_options == model.model_options


def test_options_can_be_copied_deeply_while_a_run_goes_on():
    model, copies = tiny("unet"), []

    def another_pack(args):
        copies.append((args["model_options"], copy.deepcopy(args["model_options"])))
        return args["denoised"]

    attached = windows(dim=0)(guided(model, *everything(model)))
    attached.set_model_sampler_post_cfg_function(another_pack)
    run(attached)
    assert len(copies) == 3
    for original, copied in copies:
        for key in (PLAN, RUN):
            assert copied["transformer_options"][key] is original["transformer_options"][key]
        assert copied["context_handler"].context_length == original["context_handler"].context_length


def test_telemetry_is_not_copied():
    """It stands in the options of a cascade's stages, and leads to the server."""
    telemetry = Telemetry(threading.Lock())
    assert copy.deepcopy(telemetry) is telemetry
