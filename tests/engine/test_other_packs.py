"""What other packs do to the host: a sampling function of their own, functions that write in place, conds in two calls, guiders."""

from __future__ import annotations

import math

import pytest
import tools
import torch
from adaptive_tools import ag
from tools import close, comfy, empty_latent, guided, log_of, pag, sample, tiny

from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance

STEPS = 4


def run(model, **more):
    return sample(model, steps=STEPS, latent=empty_latent(model, more.pop("batch", 1), 8), **more)


# --- a pack that replaces the host's sampling function -----------------------------------------------------------------


def replaced_sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options=None, seed=None, **kwargs):
    """The one of Automatic CFG: without input_uncond for the CFG slot, without cond_scale for post-CFG functions."""
    alone = math.isclose(cond_scale, 1.0) and not model_options.get("disable_cfg1_optimization", False)
    out = comfy.samplers.calc_cond_batch(model, [cond, None if alone else uncond], x, timestep, model_options)
    both = {
        "cond_denoised": out[0],
        "uncond_denoised": out[1],
        "sigma": timestep,
        "model": model,
        "model_options": model_options,
        "input": x,
    }
    if "sampler_cfg_function" in model_options:
        args = {"cond": x - out[0], "uncond": x - out[1], "cond_scale": cond_scale, "timestep": timestep, "cond_pos": cond}
        result = x - model_options["sampler_cfg_function"](both | args)
    else:
        result = out[1] + (out[0] - out[1]) * cond_scale
    for function in model_options.get("sampler_post_cfg_function", []):
        result = function(both | {"denoised": result, "cond": cond, "uncond": uncond})
    return result


@pytest.mark.parametrize("rules", [["apg"], ["apg", "pag", "interval"], ["pag", "ag"]], ids="+".join)
@pytest.mark.parametrize("cfg", [4.0, 1.0])
def test_a_sampling_function_that_tells_less(rules, cfg, monkeypatch):
    model = tiny("unet")
    known = {"apg": APG(norm_threshold=2.0), "pag": pag(model), "interval": GuidanceInterval(end_percent=0.6), "ag": ag(0.9)}
    main = guided(model, *(known[name] for name in rules))
    expected = run(main, cfg=cfg)
    monkeypatch.setattr(comfy.samplers, "sampling_function", replaced_sampling_function)
    assert torch.equal(run(main, cfg=cfg), expected)
    if "apg" in rules and cfg != 1:
        assert not close(expected, run(model, cfg=cfg), 1e-3)


# --- functions that write into the predictions that they get -----------------------------------------------------------


def in_place(args):
    """A pre-CFG function in the manner of Skimmed CFG."""
    args["conds_out"][0].mul_(0.5).sub_(1.0)
    return args["conds_out"]


def out_of_place(args):
    return [args["conds_out"][0] * 0.5 - 1.0, *args["conds_out"][1:]]


@pytest.mark.parametrize("rule", [pag, lambda model: Autoguidance(weak_model=tiny("unet", seed=7), scale=1.5)], ids=["PAG", "autoguidance"])
@pytest.mark.parametrize("cfg", [4.0, 1.0])
def test_terms_use_the_models_own_prediction(rule, cfg):
    results, updates = [], []
    for function in (in_place, out_of_place):
        model = tiny("unet")
        main = guided(model, rule(model))
        main.set_model_sampler_pre_cfg_function(function)
        results.append(run(main, cfg=cfg))
        updates.append(tools.curves_of(log_of(main)))
    assert close(*results, 1e-6)
    assert updates[0] == updates[1]


def test_a_copy_is_made_for_such_functions_only():
    """The prediction that terms get is the host's own tensor where nobody can write into it."""
    model, seen = tiny("unet"), []

    def post_cfg(args):
        seen.append(args["cond_denoised"].data_ptr())
        return args["denoised"]

    class Noting(type(pag(model))):
        def add(self, denoised, cond, others, step):
            seen.append(cond.data_ptr())
            return super().add(denoised, cond, others, step)

    rule = Noting(perturbation=pag(model).perturbation, scale=2.0)
    for functions, same in ((0, True), (1, False)):
        main = guided(model, rule)
        for _ in range(functions):
            main.set_model_sampler_pre_cfg_function(out_of_place)
        main.set_model_sampler_post_cfg_function(post_cfg)
        seen.clear()
        run(main)
        assert (seen[0] == seen[1]) == same


def test_a_post_cfg_function_that_writes_in_place_leaves_the_prediction_alone():
    """At cfg 1 the shaped result is D_c, and a term behind that function needs D_c as it was."""

    def halve(args):
        return args["denoised"].mul_(0.5)

    def halved(args):
        return args["denoised"] * 0.5

    results = []
    for function in (halve, halved):
        model = guided(tiny("unet"), APG())
        model.set_model_sampler_post_cfg_function(function)
        results.append(run(guided(model, pag(model)), cfg=1.0))
    assert close(*results, 1e-6)


# --- conds that are evaluated in two calls -----------------------------------------------------------------------------
