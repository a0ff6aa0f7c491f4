"""The CFG++ sampler in real sampling runs: against the host's own samplers, with terms, masks and other packs, and what it refuses."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import pytest
import tools
import torch
from tools import close, comfy, cond, counted, custom, empty_latent, guided, log_of, pag, perpneg, tiny

from lodestar.guiders.cfgpp.inversion import Inversion
from lodestar.guiders.cfgpp.sampler import CURVE
from lodestar.guiders.cfgpp.solvers import SOLVERS, equivalent_cfg, mean_equivalent_cfg
from lodestar.guiders.engine.host import reads_uncond
from lodestar.guiders.engine.plan import plan_of
from lodestar.guiders.policies.adaptive import AdaptiveGuidance
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.spaces import levels_of
from lodestar.nodes.cfgpp import LodestarCFGPP

LEVELS = {"unet": [3.0, 1.2], "unet_v": [3.0, 1.2], "mmdit": [0.8, 0.5]}


def sampler(name="euler", lambda_=0.6, eta=1.0, history="unconditional"):
    return LodestarCFGPP.execute(name, lambda_, eta, history).result[0]


def run(model, solver, cfg=1.0, steps=6, sigmas=None, latent=None, positive=None, negative=None, noise=True, **more):
    """What SamplerCustom does."""
    latent = empty_latent(model, 2) if latent is None else latent
    if sigmas is None:
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    start = comfy.sample.prepare_noise(latent, 1) if noise else torch.zeros_like(latent)
    conds = positive or cond(1), negative if negative is not None else cond(2)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, start, cfg, solver, torch.as_tensor(sigmas), *conds, latent, disable_pbar=True, seed=1, **more
        )


def host(name, **options):
    return comfy.samplers.ksampler(name, options)


# --- the host's own samplers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tools.KINDS)
@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", ["euler", "euler_ancestral"])
def test_equals_the_hosts_euler(name, lambda_, kind):
    model = tiny(kind)
    assert close(run(model, sampler(name, lambda_)), run(model, host(f"{name}_cfg_pp"), cfg=lambda_), 1e-5)


@pytest.mark.parametrize("kind", ["unet", "unet_v"])
@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_the_guided_history_equals_the_hosts_dpmpp_2m(lambda_, kind):
    model = tiny(kind)
    theirs = run(model, host("dpmpp_2m_cfg_pp"), cfg=lambda_)
    assert close(run(model, sampler("dpmpp_2m", lambda_, history="guided")), theirs, 1e-5)
    assert lambda_ == 0 or not close(run(model, sampler("dpmpp_2m", lambda_)), theirs, 1e-3)


@pytest.mark.parametrize("kind", ["unet", "unet_v"])
@pytest.mark.parametrize("name", SOLVERS)
def test_lambda_0_is_the_hosts_sampler_at_cfg_0(name, kind):
    model = tiny(kind)
    assert close(run(model, sampler(name, 0.0)), run(model, host(name), cfg=0.0), 1e-5)


@pytest.mark.parametrize(("name", "theirs", "eta"), [
    ("euler", "euler", 1.0), ("dpmpp_2m", "dpmpp_2m_sde", 0.0), ("dpmpp_2m_sde", "dpmpp_2m_sde", 1.0),
    ("dpmpp_2m_sde", "dpmpp_2m_sde", 0.3), ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", 0.0),
])  # fmt: skip
@pytest.mark.parametrize("lambda_", [0.0, 0.7])
def test_equal_predictions_on_a_flow_model_are_the_hosts_sampler(lambda_, name, theirs, eta):
    """Where the host's is right on flow models: its dpmpp_2m is not, and its ancestral samplers divide the noise in another way."""
    model, sigmas = tiny("mmdit"), [0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
    options = {} if theirs == "euler" else {"eta": eta}
    plain = run(model, host(theirs, **options), negative=cond(1), sigmas=sigmas)
    assert close(run(model, sampler(name, lambda_, eta), negative=cond(1), sigmas=sigmas), plain, 1e-4)


# --- the guider ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lambda_", [0.6, 1.0])
def test_the_guiders_cfg_does_not_matter_and_is_noticed(lambda_, caplog):
    model = tiny("unet")
    with caplog.at_level(logging.INFO):
        plain = run(model, sampler(lambda_=lambda_), cfg=1.0)
        assert "is not used" not in caplog.text
        assert run(model, sampler(lambda_=lambda_), cfg=7.5).equal(plain)
    assert "CFG++ Sampler: the guider's cfg 7.5 is not used." in caplog.text
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6).tolist()
    worth = mean_equivalent_cfg(lambda_, levels_of(sigmas, flow=False))
    assert f"CFG++ Sampler: lambda_ {lambda_:g} is worth cfg {worth:.3g} on this schedule" in caplog.text


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_costs_what_cfg_costs(name, lambda_, kind):
    """Both predictions of every evaluation, also where the host would skip one."""
    model = tiny(kind)
    second = {"unet": 5, "mmdit": 4}[kind] if name == "dpmpp_2s_ancestral" else 0  # not from pure noise, and not to the picture
    with counted(model) as rows:
        run(model, sampler(name, lambda_))
    assert sum(rows) == 2 * 2 * (6 + second)


def test_the_guiders_cfg_comes_back():
    model = tiny("unet")
    guider = custom.CFGGuider.execute(model, cond(1), cond(2), 3.0).result[0]

    def fails(args):
        raise KeyError("another pack")

    guider.sample(torch.zeros(1, 4, 8, 8) + 1, empty_latent(model, 1, 8), sampler(), torch.tensor([3.0, 0.0]), disable_pbar=True)
    assert guider.cfg == 3.0
    model.set_model_sampler_post_cfg_function(fails)
    guider = custom.CFGGuider.execute(model, cond(1), cond(2), 3.0).result[0]
    with pytest.raises(KeyError):
        guider.sample(torch.zeros(1, 4, 8, 8) + 1, empty_latent(model, 1, 8), sampler(), torch.tensor([3.0, 0.0]), disable_pbar=True)
    assert guider.cfg == 3.0


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_sampler_custom_advanced(kind):
    model = tiny(kind)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)
    guider = custom.CFGGuider.execute(model, cond(1), cond(2), 1.0).result[0]
    noise = custom.RandomNoise.execute(1).result[0]
    with torch.inference_mode():
        out, denoised = custom.SamplerCustomAdvanced.execute(
            noise, guider, sampler("euler_ancestral"), sigmas, {"samples": empty_latent(model, 2)}
        ).result
    assert out["samples"].equal(run(model, sampler("euler_ancestral")))
    assert close(denoised["samples"], out["samples"])  # the last preview is the result


def test_every_step_is_shown():
    seen = []
    run(tiny("unet"), sampler("dpmpp_2s_ancestral"), callback=lambda i, x0, x, total: seen.append((i, total, x0.shape == x.shape)))
    assert seen == [(i, 6, True) for i in range(6)]


# --- terms, other packs, masks ---------------------------------------------------------------------------------------


def latent_of(model, sigmas, solver, cfg=1.0):
    """The end of a run in the model's own space."""
    return model.model.process_latent_in(run(model, solver, cfg=cfg, sigmas=sigmas))


@pytest.mark.parametrize("kind", tools.KINDS)
@pytest.mark.parametrize("lambda_", [0.6, 1.0])
def test_terms_change_the_guided_prediction_alone(lambda_, kind):
    """PAG, and whatever another pack adds behind it."""
    plain = tiny(kind)
    model = guided(plain, pag(plain, 1.5))
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9)
    now, then = levels_of(LEVELS[kind], flow=kind == "mmdit")
    uncond, guided_ = (latent_of(m, [now.s, 0.0], host("euler"), w) for m, w in ((plain, 0.0), (model, lambda_)))  # D, in one Euler step
    start = now.s * comfy.sample.prepare_noise(empty_latent(model, 2), 1)
    expected = guided_ + then.s / then.a * (start - now.a * uncond) / now.s  # the host divides by a' at the end
    assert close(latent_of(model, LEVELS[kind], sampler(lambda_=lambda_)), expected, 1e-5)
    assert not close(latent_of(plain, LEVELS[kind], sampler(lambda_=lambda_)), expected, 1e-2)


def replaced_sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options, seed=None):
    """What a pack (Automatic CFG) puts in the host's place for good: its post-CFG functions are not told the weight."""
    alone = math.isclose(cond_scale, 1.0) and not model_options.get("disable_cfg1_optimization", False)
    conds = [cond, None if alone else uncond]
    cond_pred, uncond_pred = comfy.samplers.calc_cond_batch(model, conds, x, timestep, model_options)
    denoised = uncond_pred + (cond_pred - uncond_pred) * cond_scale
    for function in model_options.get("sampler_post_cfg_function", []):
        denoised = function({
            "denoised": denoised, "cond": cond, "uncond": uncond, "model": model, "uncond_denoised": uncond_pred,
            "cond_denoised": cond_pred, "sigma": timestep, "model_options": model_options, "input": x,
        })  # fmt: skip
    return denoised


@pytest.mark.parametrize("lambda_", [0.6, 1.0])
@pytest.mark.parametrize("rules", [(), (GuidanceInterval(start_percent=0.3, end_percent=0.7),)], ids=["plain", "interval"])
def test_a_pack_that_replaces_the_hosts_sampling_function(rules, lambda_, monkeypatch):
    model = guided(tiny("unet"), *rules)
    plain = run(model, sampler(lambda_=lambda_))
    monkeypatch.setattr(comfy.samplers, "sampling_function", replaced_sampling_function)
    assert run(model, sampler(lambda_=lambda_)).equal(plain)


def differential(sigma, mask, extra_options):
    """A mask that depends on the level, as DifferentialDiffusion's."""
    assert extra_options["sigmas"] is not None and extra_options["model"].inner_model is not None
    return (mask >= sigma[0] / extra_options["sigmas"][0]).to(mask.dtype)


@pytest.mark.parametrize("function", [None, differential])
@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize("lambda_", [0.3, 1.0])
def test_inpainting_masks_apply_to_both_predictions(lambda_, kind, function):
    """With equal predictions it is the host's Euler sampler with that mask, for every lambda."""
    model = tiny(kind)
    if function is not None:
        model.set_model_denoise_mask_function(function)
    latent = empty_latent(model, 2) + torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(8))
    mask = torch.linspace(0, 1, 16).expand(2, 16, 16)
    options = {"latent": latent, "noise_mask": mask, "negative": cond(1)}
    assert close(run(model, sampler(lambda_=lambda_), **options), run(model, host("euler"), **options), 1e-5)
    kept = run(model, sampler(lambda_=lambda_), latent=latent, noise_mask=torch.zeros(2, 16, 16))
    assert close(kept, latent, 1e-5)


@pytest.mark.parametrize("lambda_", [0.6, 1.0])
@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_outside_a_guidance_interval_it_is_the_base_sampler_on_the_prompt(kind, lambda_):
    plain = tiny(kind)
    model = guided(plain, GuidanceInterval(start_percent=0.5, end_percent=0.5))
    with counted(model) as rows:
        out = run(model, sampler(lambda_=lambda_))
    assert sum(rows) == 2 * 6  # nothing unconditional
    assert close(out, run(plain, host("euler"), cfg=1.0), 1e-5)


def test_a_guidance_interval_in_the_middle():
    plain = tiny("unet")
    model = guided(plain, GuidanceInterval(start_percent=0.3, end_percent=0.7))
    out = run(model, sampler())
    log = log_of(model)
    curve = log.curves[CURVE]
    inside = [i for i, weight in curve.items() if weight != 1]
    assert log.nfe == 6 + len(inside) and 0 < len(inside) < 6 and not close(out, run(plain, sampler()), 1e-2)


def test_video():
    model = tiny("wan")
    latent = torch.zeros(1, 16, 3, 8, 8)
    assert run(model, sampler("dpmpp_2m_sde"), latent=latent).isfinite().all()
    assert close(run(model, sampler(), latent=latent), run(model, host("euler_cfg_pp"), cfg=0.6, latent=latent), 1e-4)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_seed_twice_and_after_an_interruption(name, kind):
    model, solver = tiny(kind), sampler(name)

    def stop(i, *_):
        if i == 2:
            raise comfy.model_management.InterruptProcessingException

    first = run(model, solver)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, solver, callback=stop)
    assert run(model, solver).equal(first) and run(tiny(kind), sampler(name)).equal(first)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_report_has_the_equivalent_weights(name):
    model = tools.attach(tiny("mmdit"))
    run(model, sampler(name, 0.6, eta=0.0))
    log = log_of(model)
    levels = levels_of(log.sigmas, flow=True)
    expected = {i: equivalent_cfg(0.6, levels[i], levels[i + 1]) for i in range(6)}
    assert log.curves[CURVE] == pytest.approx(expected, rel=1e-5) and log.curves[CURVE][5] == pytest.approx(0.6)


def test_a_schedule_that_another_pack_cuts_up():
    """The sampler's own count of steps is not the run's then: the steps are found by their noise levels."""
    model, ours = tiny("unet"), sampler()

    def in_parts(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for part in (sigmas[:4], sigmas[3:]):
            x = ours.sampler_function(model, x, part, extra_args, callback, disable, **ours.extra_options)
        return x

    main = guided(model, pag(model))
    whole = run(main, ours)
    assert torch.equal(run(main, comfy.samplers.KSAMPLER(in_parts)), whole)
    assert log_of(main).evaluations == dict.fromkeys(range(6), 3)


def test_others_can_tell_that_it_reads_the_unconditional_prediction():
    assert reads_uncond(sampler()) == "CFG++ Sampler" and reads_uncond(Inversion(0.6)) == "CFG++ Inversion"
    assert reads_uncond(host("euler")) is None and reads_uncond(host("euler_cfg_pp")) == "euler_cfg_pp"


# --- refused before anything is evaluated ----------------------------------------------------------------------------

BOTH = (cond(1), cond(2))
WEIGHTS = {"cfg_conds": 3.0, "cfg_cond2_negative": 2.0, "style": "regular"}
GUIDERS = {
    "BasicGuider": (lambda model: custom.BasicGuider.execute(model, cond(1)), "needs a negative prompt"),
    "CFGGuider": (lambda model: custom.CFGGuider.execute(model, cond(1), [], 1.0), "needs a negative prompt"),
    "DualCFGGuider": (lambda model: custom.DualCFGGuider.execute(model, cond(1), cond(3), cond(2), **WEIGHTS), "cannot work with"),
    "PerpNegGuider": (lambda model: perpneg.PerpNegGuider.execute(model, *BOTH, cond(3), 3.0, 0.7), "cannot work with Guider_PerpNeg"),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_refused_guiders(name):
    model = tiny("unet")
    build, message = GUIDERS[name]
    guider = build(model).result[0]
    with counted(model) as rows, pytest.raises(ValueError, match=rf"^CFG\+\+ Sampler {message}"):
        guider.sample(torch.ones(1, 4, 8, 8), empty_latent(model, 1, 8), sampler(), torch.tensor([3.0, 0.0]), disable_pbar=True)
    assert rows == []


def test_apg_is_refused_with_the_reason():
    model = guided(tiny("unet"), APG())
    message = r"^APG \(Adaptive Projected Guidance\) and CFG\+\+ Sampler do not combine: that one reshapes the update"
    with counted(model) as rows, pytest.raises(ValueError, match=message):
        run(model, sampler())
    assert rows == []
    neutral = guided(tiny("unet"), APG(eta=1.0, norm_threshold=0.0, momentum=0.0))
    assert run(neutral, sampler()).equal(run(tiny("unet"), sampler())) and plan_of(neutral.model_options).rules


@pytest.mark.parametrize("solver", [sampler(), Inversion(0.6)], ids=["sampler", "inversion"])
def test_another_owner_of_the_combination_is_refused(solver):
    from comfy_extras.nodes_model_advanced import RescaleCFG

    model = RescaleCFG().patch(tiny("unet"), 0.7)[0]
    message = rf"^{re.escape(reads_uncond(solver))} and RescaleCFG both replace the CFG combination; bypass one of the two nodes\.$"
    with counted(model) as rows, pytest.raises(ValueError, match=message):
        run(model, solver)
    assert rows == []


@pytest.mark.parametrize("solver", [sampler(), Inversion(0.6)], ids=["sampler", "inversion"])
def test_rules_that_drop_the_unconditional_prediction_are_refused(solver):
    model = guided(tiny("unet"), AdaptiveGuidance())
    message = rf"^AG \(Adaptive Guidance\) cannot work with the sampler {re.escape(reads_uncond(solver))}: "
    with counted(model) as rows, pytest.raises(ValueError, match=message):
        run(model, solver)
    assert rows == []


@pytest.mark.parametrize("value", [-0.1, 2.5, 7.5])
def test_a_lambda_out_of_range(value):
    with pytest.raises(ValueError, match=rf"^CFG\+\+ Sampler: lambda_ is {value:g}; it lies between 0 and 1"):
        sampler(lambda_=value)


def test_a_lambda_above_1_is_warned_of(caplog):
    sampler(lambda_=1.0)
    assert not caplog.records
    sampler(lambda_=1.5)
    assert "lambda_ 1.5 is above 1" in caplog.text


def test_rising_sigmas_and_empty_starts():
    model = tiny("unet")
    with counted(model) as rows:
        with pytest.raises(ValueError, match="needs falling sigmas; to go from a picture to noise use CFG"):
            run(model, sampler(), sigmas=[0.0, 1.0, 3.0])
        with pytest.raises(ValueError, match="starts from nothing but zeros"):
            run(model, sampler(), noise=False)
    assert rows == []


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_level_that_is_repeated_is_no_step(name, kind, caplog):
    model, (high, low) = tools.attach(tiny(kind)), LEVELS[kind]
    first = 1.0 if kind == "mmdit" else 9.0  # from pure noise on, where a flow model has no signal
    with caplog.at_level(logging.INFO), counted(model) as rows:
        out = run(model, sampler(name), sigmas=[first, first, high, high, low, low, low, 0.0, 0.0])
    worth = re.search(r"is worth cfg (\S+) on", caplog.text)[1]
    assert set(log_of(model).evaluations) == {1, 3, 6}
    with counted(model) as once:
        assert run(model, sampler(name), sigmas=[first, high, low, 0.0]).equal(out)
    assert rows == once and math.isfinite(float(worth)) and out.isfinite().all()


def test_a_schedule_without_steps():
    model = tiny("unet")
    assert run(model, sampler(), sigmas=[3.0]).isfinite().all()


# --- the help page ---------------------------------------------------------------------------------------------------


def test_the_table_of_the_help_page_is_the_computed_one():
    """Its numbers are those of lambda 1, the last column, for each number of steps and kind of model."""
    from lodestar.benchmarks import cfg_of_lambda

    page = (Path(__file__).parents[2] / "js" / "docs" / "LodestarCFGPP.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in cfg_of_lambda.table().splitlines()[2:]]
    eps, flow = ({row[1]: row[-1] for row in rows if row[0] == name} for name in cfg_of_lambda.schedules())
    assert re.findall(r"^\| (\d+) \| (\d+\.\d) \| (\d+\.\d) \|$", page, re.MULTILINE) == [(steps, eps[steps], flow[steps]) for steps in eps]
