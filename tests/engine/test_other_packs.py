"""What other packs do to the host: a sampling function of their own, functions that write in place, conds in two calls, guiders."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import adaptive_tools
import pytest
import tools
import torch
from adaptive_tools import ag
from conditioning_tools import node
from tools import close, comfy, cond, counted, empty_latent, guided, log_of, pag, sample, tiny

from lodestar.guiders.cfgpp.sampler import cfgpp_sampler
from lodestar.guiders.engine.choice import Choice
from lodestar.guiders.engine.plan import Policy
from lodestar.guiders.learning.runs import Runs
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.policies.linear_ag.fit import fit
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


@dataclass(frozen=True, kw_only=True)
class Predicting(Policy):
    """D_u of the first step in place of that of the third, and one image less in the second."""

    name: ClassVar[str] = "Predicting"
    neutral = False

    def choose(self, step):
        return Choice(predicted=step.index == 2, uncond=(True, False, True) if step.index == 1 else True)

    def observe(self, cond, uncond, x, sigma, step):
        step.memory.setdefault("uncond", uncond)

    def predict(self, cond, x, sigma, step):
        return step.memory["uncond"]


SKIPPED = {"start_percent": 0.0, "end_percent": 1.0, "double_layers": "1", "single_layers": ""}
skip_layers = node("nodes_slg", "SkipLayerGuidanceDiTSimple", **SKIPPED)


def in_two_calls(model):
    """Another pack: the conditional prediction first, then the unconditional one, as the host's SkipLayerGuidanceDiTSimple does it."""

    def both(args):
        (cond, uncond), rest = args["conds"], (args["input"], args["sigma"], args["model_options"])
        first = comfy.samplers.calc_cond_batch(args["model"], [cond, None], *rest)
        second = comfy.samplers.calc_cond_batch(args["model"], [None, uncond], *rest)
        return [first[0], second[1]]

    clone = model.clone()
    clone.set_model_sampler_calc_cond_batch_function(both)
    return clone


@pytest.mark.parametrize("rules", [["ag"], ["pag", "ag"], ["apg", "interval"], ["listed"]], ids="+".join)
def test_two_calls_are_as_good_as_one(rules):
    """For each image and each step the same is evaluated, in calls of their own."""
    model = tiny("unet")
    noise = adaptive_tools.noise_for(model, 3)
    threshold = adaptive_tools.spread([adaptive_tools.gammas(model, row[None]) for row in noise])
    known = {
        "ag": ag(threshold), "pag": pag(model), "apg": APG(norm_threshold=2.0), "interval": GuidanceInterval(end_percent=0.6),
        "listed": Predicting(),
    }  # fmt: skip
    chosen = [known[name] for name in rules]
    one, two = guided(model, *chosen), guided(in_two_calls(model), *chosen)
    results = [adaptive_tools.run(main, noise) for main in (one, two)]
    assert close(*results)
    logs = [log_of(main) for main in (one, two)]
    assert (logs[0].rows, logs[0].switches) == (logs[1].rows, logs[1].switches)
    assert logs[0].evaluations == pytest.approx(logs[1].evaluations)
    assert logs[0].saved == pytest.approx(logs[1].saved)


def test_ag_switches_beside_skip_layer_guidance():
    model = skip_layers(tiny("mmdit"))
    main = guided(model, ag(-1.0))
    with counted(model) as rows:
        result = run(main)
    assert sum(rows) == STEPS + 1
    assert torch.isfinite(result).all()
    assert close(run(guided(model, ag(2.0))), run(model), 1e-6)


def test_linear_ag_is_fitted_beside_skip_layer_guidance():
    model = skip_layers(tiny("mmdit"))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)
    latent = {"samples": empty_latent(model, 1, 8)}
    runs = Runs("LinearAG: fit", model, [cond(1)], cond(2), latent, comfy.samplers.sampler_object("euler"), sigmas, 4.0, 0)
    with torch.inference_mode():
        coefficients = fit(runs, 1)
    assert sorted(coefficients.betas) == [1]


def uncond_first(args):
    """Nothing can be left out of the unconditional prediction any more, and nothing can be compared."""
    (cond, uncond), rest = args["conds"], (args["input"], args["sigma"], args["model_options"])
    second = None if uncond is None else comfy.samplers.calc_cond_batch(args["model"], [None, uncond], *rest)[1]
    first = comfy.samplers.calc_cond_batch(args["model"], [cond, None], *rest)
    return first if second is None else [first[0], second]


def copied_conds(args):
    """Which of the lists is the positive one cannot be seen."""
    conds = [None if cond is None else [entry.copy() for entry in cond] for cond in args["conds"]]
    return comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])


@pytest.mark.parametrize("function", [uncond_first, copied_conds])
@pytest.mark.parametrize("rule", [ag(0.9), Predicting()], ids=["AG", "another"])
def test_a_way_that_cannot_be_followed_is_said_after_the_first_evaluation(rule, function):
    model = tiny("unet")
    model.set_model_sampler_calc_cond_batch_function(function)
    with counted(model) as rows, pytest.raises(ValueError, match=rf"^{re.escape(rule.name)} .* bypass") as error:
        run(guided(model, rule))
    assert sum(rows) == 2
    assert "\n" not in str(error.value)
    for other in (APG(norm_threshold=2.0), GuidanceInterval(end_percent=0.5)):
        assert close(run(guided(model, other)), run(guided(tiny("unet"), other)))


# --- guiders of other packs --------------------------------------------------------------------------------------------


class Scheduled(comfy.samplers.CFGGuider):
    """As KJNodes' ScheduledCFG: the host's sampling function, with CFG in a part of the schedule."""

    start, end = 0.0, 1.0

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        levels = model_options["transformer_options"]["sample_sigmas"]
        share = int((levels >= timestep[0]).sum() - 1) / (len(levels) - 1)
        inside = self.start <= share <= self.end
        negative, positive = self.conds.get("negative"), self.conds.get("positive")
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, negative if inside else None, positive, self.cfg if inside else 1.0,
            model_options=model_options, seed=seed,
        )  # fmt: skip


class OwnWeight(comfy.samplers.CFGGuider):
    """As RES4LYF's SharkGuider and Inspire's ScheduledCFG: the weight is not the guider's cfg."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        self.cfg = 4.0
        return super().predict_noise(x, timestep, model_options, seed)


class NoSlot(comfy.samplers.CFGGuider):
    """Combines by itself."""

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        conds = [self.conds["positive"], self.conds["negative"]]
        cond, uncond = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        return uncond + 4.0 * (cond - uncond)


def run_with(guider_class, model):
    guider = guider_class(model)
    guider.set_conds(cond(1), cond(2))
    guider.set_cfg(4.0)
    noise = adaptive_tools.noise_for(model, 2)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)


@pytest.mark.parametrize("guider", [Scheduled, OwnWeight])
@pytest.mark.parametrize("rules", [["apg"], ["apg", "pag"], ["apg", "interval"], ["interval"], ["ag"]], ids="+".join)
def test_guiders_that_use_the_hosts_combination(rules, guider):
    model = tiny("unet")
    known = {"apg": APG(norm_threshold=2.0), "pag": pag(model), "interval": GuidanceInterval(end_percent=0.6), "ag": ag(-1.0)}
    ours, theirs = (guided(model, *(known[name] for name in rules)) for _ in range(2))
    assert close(run_with(guider, theirs), run_with(comfy.samplers.CFGGuider, ours), 1e-6)
    assert log_of(theirs).rows == log_of(ours).rows


def test_a_guider_with_a_schedule_of_its_own():
    class Half(Scheduled):
        end = 0.4

    model = tiny("unet")
    main = guided(model, APG(norm_threshold=2.0), ag(1.0))
    with counted(model) as rows:
        run_with(Half, main)
    assert rows == [4, 4, 2, 2]


def test_a_guider_that_combines_by_itself_is_noticed_in_its_first_evaluation():
    model, rule = tiny("unet"), APG()
    with counted(model) as rows, pytest.raises(ValueError, match="NoSlot") as error:
        run_with(NoSlot, guided(model, rule))
    assert len(rows) == 1
    assert rule.name in str(error.value)
    assert "\n" not in str(error.value)
    for kept in (ag(-1.0), GuidanceInterval(end_percent=0.6), pag(model)):  # these need the two predictions alone
        main, ours = guided(model, kept), guided(model, kept)
        assert close(run_with(NoSlot, main), run_with(comfy.samplers.CFGGuider, ours), 1e-5)
        assert log_of(main).rows == log_of(ours).rows


def test_cfgpp_sets_the_guiders_cfg_which_another_packs_guider_may_not_read():
    model, sampler = tiny("unet"), cfgpp_sampler("euler", 0.6)
    guider = OwnWeight(model)
    guider.set_conds(cond(1), cond(2))
    noise = adaptive_tools.noise_for(model, 1)
    with counted(model) as rows, pytest.raises(ValueError, match="OwnWeight: that guider has a way of its own to combine the predictions"):
        guider.sample(noise, noise * 0, sampler, torch.tensor([2.0, 1.0, 0.0]), disable_pbar=True, seed=1)
    assert not rows


def test_policies_need_a_guider_with_one_cfg():
    class Listed(Scheduled):
        def __init__(self, model):
            super().__init__(model)
            self.cfg = [4.0] * STEPS

        def set_cfg(self, cfg):
            pass

    model = tiny("unet")
    with counted(model) as rows, pytest.raises(ValueError, match=r"^Guidance Interval .*Listed.* bypass Guidance Interval\.$"):
        run_with(Listed, guided(model, GuidanceInterval(end_percent=0.5)))
    assert not rows
