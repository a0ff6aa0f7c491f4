"""Adaptive Guidance: its invariants on the real host, against the rule written without the engine."""

from __future__ import annotations

import contextlib
import gc
import itertools
from types import SimpleNamespace

import pytest
import test_conditioning
import tools
import torch
from tools import KINDS, attach, close, comfy, cond, counted, custom, empty_latent, guided, log_of, pag, perpneg, sample, tiny

from lodestar.guiders.engine.curves import COSINE
from lodestar.guiders.policies import adaptive
from lodestar.guiders.policies.adaptive import SPACES, AdaptiveGuidance, gamma, in_space
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.spaces import Layout
from lodestar.guiders.terms.autoguidance import Autoguidance

STEPS = 6
CFG = 4.0
MULTISTAGE = ["heun", "dpm_2", "dpmpp_2s_ancestral"]


def ag(threshold, **more):
    return AdaptiveGuidance(threshold=threshold, **more)


def noise_for(model, batch=1):
    """Rows of different sizes, so that they switch at different steps."""
    noise = torch.randn(empty_latent(model, batch, 8).shape, generator=torch.Generator().manual_seed(3))
    return noise * torch.linspace(1, 1.6, batch).reshape(-1, 1, 1, 1)


def run(model, noise=None, cfg=CFG, sampler="euler", **more):
    noise = noise_for(model) if noise is None else noise
    more = {"positive": cond(1), "negative": cond(2), "seed": 1} | more
    positive, negative = more.pop("positive"), more.pop("negative")
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, STEPS, cfg, sampler, "normal", positive, negative, torch.zeros_like(noise), disable_pbar=True, **more
        )


def gammas(model, noise=None, space="denoised", sampler="euler", rules=(), **more):
    """gamma at every step of a CFG run of one sample."""
    main = guided(model, *rules, ag(1.0, space=space))
    run(main, noise, sampler=sampler, **more)
    curve = log_of(main).curves[COSINE if space == "denoised" else f"{COSINE} ({space})"]
    return [curve[i] for i in sorted(curve)]


def between(curve, step):
    """A threshold that is first reached at this step."""
    before, here = max(curve[:step], default=-1.0), curve[step]
    assert here > before + 1e-6, curve
    return (before + here) / 2


def met(curve, threshold):
    return next((i for i, value in enumerate(curve) if value >= threshold), None)


def spread(curves):
    """A threshold that the samples reach at different steps."""
    candidates = sorted((p + q) / 2 for curve in curves for p, q in itertools.pairwise(curve))
    best = max(candidates, key=lambda t: len({met(curve, t) for curve in curves} - {None, STEPS - 1}))
    assert len({met(curve, best) for curve in curves}) > 1
    return best


def without_the_engine(model, threshold, space="denoised", same_step=False, stages=1, rules=()):
    """A clone on which a post-CFG function applies the rule, by float64 cosines of torch; D_u is always evaluated."""
    clone = tools.reference(model, *rules)
    state = SimpleNamespace(switched=None, decided=None, evaluations=0)

    def vectors(args):
        x, sigma = args["input"].double(), args["sigma"].double().reshape(-1, 1, 1, 1)
        for d in (args["cond_denoised"].double(), args["uncond_denoised"].double()):
            if isinstance(model.model.model_sampling, comfy.model_sampling.CONST):
                eps = (x - (1 - sigma) * d) / sigma
                v = eps - d
            else:
                eps = (x - d) / sigma
                v = (eps - sigma * d) / (1 + sigma**2) ** 0.5
            yield {"denoised": d, "noise": eps, "velocity": v}[space].flatten(1)

    def post_cfg(args):
        first, state.evaluations = state.evaluations % stages == 0, state.evaluations + 1
        if state.switched is None:
            state.switched = state.decided = torch.zeros(len(args["input"]), dtype=torch.bool)
        if first:
            state.decided = state.switched
            state.switched = state.switched | (torch.cosine_similarity(*vectors(args), dim=1) >= threshold)
            if same_step:
                state.decided = state.switched
        return torch.where(state.decided.reshape(-1, 1, 1, 1), args["cond_denoised"], args["denoised"])

    clone.set_model_sampler_post_cfg_function(post_cfg)
    return clone


# --- gamma -----------------------------------------------------------------------------------------------------------


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


# --- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_above_1_it_is_cfg_itself(kind):
    model = tiny(kind)
    with counted(model) as rows:
        assert torch.equal(run(guided(model, ag(1.001))), run(model))
    assert rows == [2] * 2 * STEPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("switch", ["next_step", "same_step"])
def test_at_minus_1_it_is_cfg_in_the_first_step_at_most(kind, switch):
    model = tiny(kind)
    main = guided(model, ag(-1.0, switch=switch))
    with counted(model) as rows:
        result = run(main)
    assert rows == [2] + [1] * (STEPS - 1)
    assert log_of(main).nfe == STEPS + 1
    if switch == "same_step":
        assert close(result, run(model, cfg=1.0), 1e-5)
    else:
        assert not close(result, run(model, cfg=1.0), 1e-3) and not close(result, run(model), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_predictions_switch_at_once_and_change_nothing(kind):
    model = tiny(kind)
    main = guided(model, ag(1.0))
    with counted(model) as rows:
        result = run(main, negative=cond(1))
    assert close(result, run(model, negative=cond(1)), 1e-5)
    if log_of(main).curves[COSINE][0] == 1:  # the two rows of a batch may differ by rounding
        assert rows == [2] + [1] * (STEPS - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("switch", ["next_step", "same_step"])
def test_cfg_before_the_switch_and_the_conditional_model_after_it(kind, at, switch):
    """Bit-exactly: the run is CFG's up to the switch, and from that state the conditional sampler's."""
    model = tiny(kind)
    main = guided(model, ag(between(gammas(model), at), switch=switch))
    with counted(model) as rows:
        result = run(main)
    assert rows == [2] * (at + 1) + [1] * (STEPS - at - 1)
    first = at + (switch == "next_step")
    assert log_of(main).switches["Adaptive Guidance (AG)"].steps == (first,)
    assert log_of(main).nfe == STEPS + at + 1
    expected = run(cfg_until(model, first))
    if switch == "next_step":
        assert torch.equal(result, expected)
    assert close(result, expected, 1e-5)  # in the same step D_c comes from a batch of two, and differs by its rounding


def cfg_until(model, step):
    """A clone whose guider is set to cfg 1 from a step on, as other packs do it."""
    evaluations = itertools.count()

    def predict_noise(executor, *args, **more):
        if next(evaluations) == step:
            executor.class_obj.cfg = 1.0
        return executor(*args, **more)

    return tools.with_wrapper(model, "predict_noise", predict_noise)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_spaces(kind, space):
    """The switch is where float64 cosines in that space put it."""
    model = tiny(kind)
    if (kind, space) == ("mmdit", "noise"):  # pure noise at t = 1: the two are equal, and the rule stops at once
        main = guided(model, ag(0.99999, space=space))
        run(main)
        assert log_of(main).nfe == STEPS + 1
        return
    curve = gammas(model, space=space)
    threshold = max(between([*curve[:i], v], i) for i, v in enumerate(curve) if v > max(curve[:i], default=-1.0) + 1e-6)
    main = guided(model, ag(threshold, space=space))
    result = run(main)
    assert close(result, run(without_the_engine(model, threshold, space)))
    assert log_of(main).nfe == STEPS + met(curve, threshold) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_higher_threshold_never_switches_earlier(kind):
    model = tiny(kind)
    found = []
    for threshold in (-1.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.99999):
        main = guided(model, ag(threshold))
        run(main)
        found.append(log_of(main).nfe)
    assert found == sorted(found) and found[0] == STEPS + 1 and len(set(found)) > 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [-1.0, 0.9, 1.0])
def test_at_cfg_1_there_is_nothing_to_save(kind, threshold):
    model = tiny(kind)
    main = guided(model, ag(threshold))
    with counted(model) as rows:
        assert torch.equal(run(main, cfg=1.0), run(model, cfg=1.0))
    assert rows == [1] * 2 * STEPS


def test_gamma_falling_below_the_threshold_does_not_bring_cfg_back():
    model = tiny("unet_v")  # in noise space gamma falls from step to step
    curve = gammas(model, space="noise")
    assert curve[0] > curve[-1]
    main = guided(model, ag((curve[0] + curve[1]) / 2, space="noise"))
    run(main)
    assert log_of(main).nfe == STEPS + 1


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "switch", "sampler"),
    [
        ("unet", "next_step", "euler"), ("unet_v", "next_step", "euler"), ("mmdit", "next_step", "euler"),
        ("unet", "next_step", "heun"), ("unet_v", "same_step", "euler"), ("mmdit", "same_step", "dpm_2"),
    ],
)  # fmt: skip
def test_company_changes_nobodys_result_and_switched_rows_cost_nothing(kind, switch, sampler):
    model = tiny(kind)
    noise = noise_for(model, 3)
    threshold = spread([gammas(model, noise[i : i + 1], sampler=sampler) for i in range(3)])
    main = guided(model, ag(threshold, switch=switch))
    with counted(model) as rows:
        together = run(main, noise, sampler=sampler)
    log = log_of(main)
    alone, rows_alone = [], 0
    for i in range(3):
        with counted(model) as own:
            alone.append(run(main, noise[i : i + 1], sampler=sampler))
        rows_alone += sum(own)
        assert log_of(main).switches[AdaptiveGuidance.name].steps == log.switches[AdaptiveGuidance.name].steps[i : i + 1]
    assert close(together, torch.cat(alone))
    assert sum(rows) == rows_alone == log.rows
    assert log.nfe == pytest.approx(log.rows / 3) and sum(log.evaluations.values()) == pytest.approx(log.nfe)
    assert len(set(log.switches[AdaptiveGuidance.name].steps)) > 1


@pytest.mark.parametrize("sampler", MULTISTAGE)
@pytest.mark.parametrize("switch", ["next_step", "same_step"])
def test_stages_of_a_step_get_one_decision(sampler, switch):
    model = tiny("unet")
    noise = noise_for(model, 3)
    curves = [gammas(model, noise[i : i + 1], sampler=sampler) for i in range(3)]
    threshold = spread(curves)
    main = guided(model, ag(threshold, switch=switch))
    result = run(main, noise, sampler=sampler)
    reference = without_the_engine(model, threshold, same_step=switch == "same_step", stages=2)
    assert close(result, run(reference, noise, sampler=sampler))


def test_video_has_one_gamma_per_sample():
    model = tiny("wan")
    main = guided(model, ag(1.0))
    plain, result = test_conditioning.video_run(model), test_conditioning.video_run(main)
    assert torch.equal(plain, result)
    curve = log_of(main).curves[COSINE]
    main = guided(model, ag(between(list(curve.values()), 1)))
    with counted(model) as rows:
        test_conditioning.video_run(main)
    assert rows == [2, 2, 1]
    assert log_of(main).switches[AdaptiveGuidance.name].steps == (2,)


def test_packed_audio_and_video():
    model = tiny("av")
    main = guided(model, ag(-1.0))
    test_conditioning.packed_run(main)
    assert log_of(main).nfe == test_conditioning.STEPS + 1


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
    with pytest.raises(ValueError, match=r"^Adaptive Guidance \(AG\) and Adaptive Guidance \(AG\) both decide when CFG ends; bypass one"):
        attach(one, ag(0.95))
    attach(one, ag(1.001))


# --- with the host and other packs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", test_conditioning.EVERYWHERE, ids=lambda function: function.__name__)
def test_conditioning_of_every_kind(conditioning):
    model = tiny("mmdit")
    changes = conditioning(model)
    latent = changes.pop("latent", empty_latent(model, 1, test_conditioning.SIZE)).repeat(2, 1, 1, 1)

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
    control = test_conditioning.control_net()
    conds = {name: test_conditioning.with_values(cond(i), control=control) for i, name in enumerate(("positive", "negative"), start=1)}
    latent = empty_latent(model, 2, test_conditioning.SIZE)
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
    with counted(model) as rows, pytest.raises(ValueError, match=rf"^Adaptive Guidance \(AG\) cannot work with the sampler {sampler}: "):
        run(guided(model, ag(0.9)), sampler=sampler)
    assert not rows
    assert torch.isfinite(run(guided(model, ag(1.001)), sampler=sampler)).all()


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
    with pytest.raises(ValueError, match=r"^Adaptive Guidance \(AG\) cannot work with Guider_PerpNeg: "):
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
def test_one_wait_for_the_device_in_a_step_and_none_after_the_switch(switch, monkeypatch):
    model = tiny("unet")
    noise = noise_for(model, 3)
    waits = []
    monkeypatch.setattr(adaptive, "_latch", lambda *given, original=adaptive._latch: waits.append(1) or original(*given))
    main = guided(model, ag(0.99, switch=switch))
    run(main, noise, sampler="heun")
    last = max(log_of(main).switches[AdaptiveGuidance.name].steps)
    assert 0 < last < STEPS - 1
    assert len(waits) == last + (switch == "same_step")


# --- the node --------------------------------------------------------------------------------------------------------


def test_the_node_attaches_what_it_says():
    from lodestar.nodes.policies.adaptive import LodestarAdaptiveGuidance

    made = LodestarAdaptiveGuidance.execute(tiny("unet"), threshold=0.98, space="velocity", switch="same_step").args[0]
    assert tools.plan_of(made.model_options).rules == (ag(0.98, space="velocity", switch="same_step"),)
    made = LodestarAdaptiveGuidance.execute(tiny("unet"), threshold=0.98, space="noise", stop_terms=True).args[0]
    assert tools.plan_of(made.model_options).rules == (ag(0.98, space="noise", stop_terms=True),)
