"""Adaptive Guidance with other rules, every kind of conditioning, other packs and guiders, and in interrupted runs."""

from __future__ import annotations

import contextlib
import gc
import re

import conditioning_tools
import pytest
import torch
from adaptive_tools import CFG, STEPS, ag, between, gammas, noise_for, run, spread, without_the_engine
from tools import KINDS, attach, close, comfy, cond, counted, custom, empty_latent, guided, log_of, pag, perpneg, sample, tiny
from torch.overrides import TorchFunctionMode

from lodestar.guiders.engine.curves import COSINE
from lodestar.guiders.policies.adaptive import AdaptiveGuidance
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance

# --- with other rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_apgs_memory_ends_with_the_switch(kind):
    model = tiny(kind)
    noise = noise_for(model, 3)
    apg = APG(momentum=-0.5, norm_threshold=3.0)
    threshold = spread([gammas(model, noise[i : i + 1], rules=[apg]) for i in range(3)])
    for rules in ([apg, ag(threshold)], [ag(threshold), apg]):
        result = run(guided(model, *rules), noise)
        assert close(result, run(without_the_engine(model, threshold, rules=[apg]), noise))


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_terms_go_on_after_the_switch_unless_they_are_stopped(kind, stop):
    model, weak = tiny(kind), tiny(kind, seed=7)
    rules = [pag(model, rescale=0.5), Autoguidance(weak_model=weak, scale=1.5)]
    noise = noise_for(model, 3)
    threshold = spread([gammas(model, noise[i : i + 1], rules=rules) for i in range(3)])
    main = guided(model, *rules, ag(threshold, stop_terms=stop))
    with counted(model, weak) as rows:
        together = run(main, noise)
    alone, rows_alone = [], 0
    for i in range(3):
        with counted(model, weak) as own:
            alone.append(run(main, noise[i : i + 1]))
        rows_alone += sum(own)
        since = log_of(main).switches[AdaptiveGuidance.name].steps[0] or STEPS
        assert sum(own) == 4 * since + (1 if stop else 3) * (STEPS - since)
    assert sum(rows) == rows_alone
    assert close(together, torch.cat(alone), 3e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_terms_leave_the_conditional_model_bit_exactly(kind):
    model, weak = tiny(kind), tiny(kind, seed=7)
    rules = [APG(), pag(model, rescale=0.5), Autoguidance(weak_model=weak, scale=1.5)]
    after = guided(model, *rules, ag(-1.0, stop_terms=True, switch="same_step"))
    assert close(run(after), run(model, cfg=1.0), 1e-5)


def test_with_an_interval():
    """Outside of the interval gamma cannot be seen; the latch is kept."""
    model = tiny("unet_v")
    main = guided(model, GuidanceInterval(start_percent=0.3), ag(-1.0))
    run(main)
    log = log_of(main)
    start = float(model.model.model_sampling.percent_to_sigma(0.3))
    first = next(i for i, sigma in enumerate(log.sigmas) if sigma <= start)
    assert first > 0 and log.evaluations == {i: 2 if i == first else 1 for i in range(STEPS)}
    assert log.switches[AdaptiveGuidance.name].steps == (first + 1,)


def test_two_of_them_are_refused():
    one = attach(tiny("unet"), ag(0.9))
    with pytest.raises(ValueError, match=r"^AG \(Adaptive Guidance\) and AG \(Adaptive Guidance\) both decide when CFG ends; bypass one"):
        attach(one, ag(0.95))
    attach(one, ag(1.001))


# --- with the host and other packs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", conditioning_tools.EVERYWHERE, ids=lambda function: function.__name__)
def test_conditioning_of_every_kind(conditioning):
    model = tiny("mmdit")
    changes = conditioning(model)
    latent = changes.pop("latent", empty_latent(model, 1, conditioning_tools.SIZE)).repeat(2, 1, 1, 1)

    def sampled(model):
        return sample(model, steps=STEPS, latent=latent, **changes)

    main = guided(model, ag(1.0))
    sampled(main)
    curve = list(log_of(main).curves[COSINE].values())
    threshold = between(curve, curve.index(max(curve[1:-1])))
    main = guided(model, ag(threshold))
    assert close(sampled(main), sampled(without_the_engine(model, threshold)), 3e-4)
    assert any(log_of(main).switches[AdaptiveGuidance.name].steps)


def test_control_nets_of_switched_rows():
    model = tiny("unet")
    control = conditioning_tools.control_net()
    conds = {name: conditioning_tools.with_values(cond(i), control=control) for i, name in enumerate(("positive", "negative"), start=1)}
    latent = empty_latent(model, 2, conditioning_tools.SIZE)
    main = guided(model, ag(0.9999))
    result = sample(main, steps=STEPS, latent=latent, **conds)
    assert STEPS < log_of(main).nfe < 2 * STEPS
    assert close(result, sample(without_the_engine(model, 0.9999), steps=STEPS, latent=latent, **conds), 3e-4)


@pytest.mark.parametrize("order", ["before", "after"])
def test_functions_of_other_packs_keep_running(order):
    """A post-CFG function of another pack changes D in every step, and sees no guidance after the switch."""
    model = tiny("unet")
    seen = []

    def post(args):
        seen.append((args["cond_denoised"].clone(), args["uncond_denoised"].clone(), args["cond_scale"], args["denoised"].clone()))
        return 0.9 * args["denoised"]

    def pre(args):
        assert len(args["conds_out"]) == 2
        return [args["conds_out"][0] * 1.01, args["conds_out"][1] * 1.01]

    def patched(model):
        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(post)
        clone.set_model_sampler_pre_cfg_function(pre)
        return clone

    rule = ag(0.9)
    main = patched(guided(model, rule)) if order == "before" else guided(patched(model), rule)
    run(main)
    since = log_of(main).switches[AdaptiveGuidance.name].steps[0]
    assert 0 < since < STEPS and len(seen) == STEPS
    for step, (c, u, w, d) in enumerate(seen):
        assert w == CFG and torch.equal(c, u) == (step >= since)
        assert torch.equal(d, c) == (step >= since)


def test_a_pack_that_wants_uncond_at_cfg_1_does_not_pay_for_it_after_the_switch():
    model = tiny("unet").clone()
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"], disable_cfg1_optimization=True)
    with counted(model) as rows:
        run(guided(model, ag(-1.0)))
    assert rows == [2] + [1] * (STEPS - 1)


@pytest.mark.parametrize("sampler", [name for name in comfy.samplers.SAMPLER_NAMES if "cfg_pp" in name])
def test_samplers_that_read_uncond_are_refused_by_name(sampler):
    model = tiny("unet")
    with counted(model) as rows, pytest.raises(ValueError, match=rf"^AG \(Adaptive Guidance\) cannot work with the sampler {sampler}: "):
        run(guided(model, ag(0.9)), sampler=sampler)
    assert not rows
    assert torch.isfinite(run(guided(model, ag(1.001)), sampler=sampler)).all()


def test_the_hosts_other_sampler_of_cfgpp_is_refused_too():
    """SamplerEulerCFG++, "alternative": its name does not say what it reads."""
    from comfy_extras.nodes_advanced_samplers import SamplerEulerCFGpp

    model = tiny("unet")
    solver = SamplerEulerCFGpp.execute("alternative").result[0]
    latent, sigmas = empty_latent(model, 1, 8), torch.tensor([3.0, 1.0, 0.0])
    for rule, words in ((ag(0.9), "cannot work with the sampler euler_pp"), (APG(), "and euler_pp do not combine")):
        guider = custom.CFGGuider.execute(guided(model, rule), cond(1), cond(2), 2.0).result[0]
        with counted(model) as rows, pytest.raises(ValueError, match=rf"^{re.escape(rule.name)} {words}: "):
            guider.sample(noise_for(model), latent, solver, sigmas, disable_pbar=True, seed=1)
        assert not rows


def sampled_by(guider, model):
    latent = empty_latent(model, 1, 8)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    with torch.inference_mode():
        return guider.sample(noise_for(model), latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)


def test_a_guider_without_negative():
    model = tiny("unet")
    results = []
    for of in (model, guided(model, ag(0.5))):
        guider = custom.Guider_Basic(of)
        guider.set_conds(cond(1))
        results.append(sampled_by(guider, model))
    assert torch.equal(*results)


def test_a_guider_with_two_negatives_drops_both():
    """Compared is the positive with the negative; D is then D_c alone, as documented."""
    model = tiny("unet")
    main = guided(model, ag(-1.0, switch="same_step"))
    results = []
    for of in (main, model):
        guider = custom.Guider_DualCFG(of)
        guider.set_conds(cond(1), cond(3), cond(2))
        guider.set_cfg(*((4.0, 2.0) if of is main else (1.0, 1.0)), nested=False)
        results.append(sampled_by(guider, model))
    assert log_of(main).evaluations == {0: 3} | dict.fromkeys(range(1, STEPS), 1)
    assert close(*results, 1e-5)


def test_a_guider_that_combines_by_itself_is_refused_by_name():
    model = tiny("unet")
    guider = perpneg.Guider_PerpNeg(guided(model, ag(0.9)))
    guider.set_conds(cond(1), cond(2), cond(3))
    guider.set_cfg(4.0, 1.0)
    with pytest.raises(ValueError, match=r"^AG \(Adaptive Guidance\) cannot work with Guider_PerpNeg: "):
        sampled_by(guider, model)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_runs_leave_nothing_behind():
    model = tiny("unet")
    noise = noise_for(model, 3)
    main = guided(model, APG(), ag(spread([gammas(model, noise[i : i + 1], rules=[APG()]) for i in range(3)])))
    first = run(main, noise)
    log = log_of(main)
    assert torch.equal(run(main, noise), first)
    assert log_of(main).evaluations == log.evaluations and log_of(main).switches == log.switches

    def stop(step, denoised, x, total):
        if step == STEPS - 2:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        run(main, noise, callback=stop)
    gc.collect()
    assert torch.equal(run(main, noise), first)


def test_each_part_of_a_split_run_starts_afresh():
    model = tiny("unet")
    main = guided(model, ag(-1.0))
    noise = noise_for(model)
    half = run(main, noise, last_step=STEPS // 2, force_full_denoise=False)
    assert log_of(main).evaluations == {0: 2, 1: 1, 2: 1}
    with torch.inference_mode():
        comfy.sample.sample(
            main, torch.zeros_like(noise), STEPS, CFG, "euler", "normal", cond(1), cond(2), half, disable_pbar=True, disable_noise=True,
            start_step=STEPS // 2, seed=1,
        )  # fmt: skip
    assert log_of(main).evaluations == {0: 2, 1: 1, 2: 1}


@pytest.mark.parametrize("switch", ["next_step", "same_step"])
def test_one_wait_for_the_device_in_a_step_and_none_after_the_switch(switch):
    model = tiny("unet")
    noise = noise_for(model, 3)
    reads = []

    class Reads(TorchFunctionMode):
        """Which images have met the threshold is the one boolean tensor that anybody reads."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__) and args[0].dtype == torch.bool:
                reads.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    main = guided(model, ag(0.99, switch=switch))
    with Reads():
        run(main, noise, sampler="heun")
    last = max(log_of(main).switches[AdaptiveGuidance.name].steps)
    assert 0 < last < STEPS - 1
    assert [tuple(shape) for shape in reads if shape] == [(3,)] * (last + (switch == "same_step"))
