"""The host's own sampling nodes and guiders, against predictions that the host computes one by one."""

from __future__ import annotations

import inspect

import pytest
import tools
import torch
from tools import close, comfy, cond, counted, custom, empty_latent, guided, log_of, nodes, pag, perpneg, tiny

from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG, projected_update
from lodestar.guiders.terms.autoguidance import Autoguidance

POSITIVE, NEGATIVE, THIRD = (cond(i) for i in (1, 2, 3))
LEVELS = {"unet": [2.0, 0.0], "mmdit": [0.7, 0.0]}  # one Euler step to zero: the result is the denoised prediction
KINDS = ["unet", "mmdit"]
needs_dual_model = pytest.mark.skipif(not hasattr(custom, "DualModelGuider"), reason="this ComfyUI has no DualModelGuider")


def call(node, **inputs):
    """Execute a node as the host does: a V3 class, or a V1 class by its FUNCTION."""
    if hasattr(node, "FUNCTION"):
        return getattr(node(), node.FUNCTION)(**inputs)[0]
    known = inspect.signature(node.execute).parameters
    return node.execute(**{name: value for name, value in inputs.items() if name in known}).result[0]


def advanced(guider, sigmas, sampler="euler", latent=None, seed=1):
    latent = {"samples": empty_latent(guider.model_patcher, 1, 8)} if latent is None else latent
    with torch.inference_mode():
        noise, solver = call(custom.RandomNoise, noise_seed=seed), call(custom.KSamplerSelect, sampler_name=sampler)
        out = call(
            custom.SamplerCustomAdvanced, noise=noise, guider=guider, sampler=solver, sigmas=torch.tensor(sigmas), latent_image=latent
        )
    return out["samples"]


def basic(model, positive=POSITIVE):
    return call(custom.BasicGuider, model=model, conditioning=positive)


def cfg(model, positive=POSITIVE, w=4.0):
    return call(custom.CFGGuider, model=model, positive=positive, negative=NEGATIVE, cfg=w)


def dual(model, style="regular", first=3.0, second=2.0):
    weights = {"cfg_conds": first, "cfg_cond2_negative": second}
    return call(custom.DualCFGGuider, model=model, cond1=POSITIVE, cond2=THIRD, negative=NEGATIVE, style=style, **weights)


def nested(model):
    return dual(model, "nested")


def perp_neg(model):
    inputs = {"positive": POSITIVE, "negative": NEGATIVE, "empty_conditioning": THIRD, "cfg": 3.0, "neg_scale": 0.7}
    return call(perpneg.PerpNegGuider, model=model, **inputs)


def dual_model(model):
    other = tiny("mmdit" if model.model.latent_format.latent_channels == 16 else "unet", seed=3)
    return call(custom.DualModelGuider, model=model, model_negative=other, positive=POSITIVE, negative=NEGATIVE, cfg=3.0)


GUIDERS = [
    basic,
    cfg,
    pytest.param(lambda model: cfg(model, w=1.0), id="cfg1"),
    dual,
    nested,
    perp_neg,
    pytest.param(dual_model, marks=needs_dual_model),
]
WITH_UNCOND = [cfg, dual, nested]


def prediction(model, positive, levels, rule=None):
    """One denoised prediction, computed alone."""
    if rule is None:
        return advanced(basic(model, positive), levels)
    clean = prediction(model, positive, levels)  # the reference adds 1 (D_c - D_p)
    return clean - (advanced(basic(tools.reference(model, rule), positive), levels) - clean) / rule.scale


# --- terms under every guider ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guider", GUIDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_terms_add_the_same_update_under_every_guider(kind, guider):
    model, weak, levels = tiny(kind), tiny(kind, seed=7), LEVELS[kind]
    clean, poor = (prediction(m, POSITIVE, levels) for m in (model, weak))
    perturbed = prediction(model, POSITIVE, levels, pag(model, 1.0))
    assert not close(perturbed, clean, 1e-2)
    expected = advanced(guider(model), levels) + 2.0 * (clean - perturbed) + 0.5 * (clean - poor)
    result = advanced(guider(guided(model, pag(model, 2.0), Autoguidance(weak_model=weak, scale=1.5))), levels)
    assert close(result, expected)


@pytest.mark.parametrize(("guider", "rows"), [(basic, 1), (cfg, 2), (dual, 3), (nested, 3), (perp_neg, 3)])
def test_extra_branch_joins_the_guiders_own_call(guider, rows):
    model = tiny("unet")
    main = guided(model, pag(model))
    with counted(model) as calls:
        advanced(guider(main), [2.0, 1.0, 0.0])
    assert calls == [rows + 1] * 2
    assert (log_of(main).rows, log_of(main).nfe) == (2 * rows + 2, 2 * rows + 2)


@pytest.mark.parametrize("guider", GUIDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_neutral_settings_change_nothing_under_every_guider(kind, guider):
    model = tiny(kind)
    levels = [LEVELS[kind][0], LEVELS[kind][0] / 2, 0.0]
    assert torch.equal(advanced(guider(guided(model, *tools.neutral_rules(kind))), levels), advanced(guider(model), levels))


# --- shapers and policies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [APG(), GuidanceInterval(end_percent=0.5)], ids=["APG", "interval"])
@pytest.mark.parametrize("guider", [perp_neg, pytest.param(dual_model, marks=needs_dual_model)])
def test_guiders_with_a_combination_of_their_own_refuse_shapers(guider, rule):
    model = tiny("unet")
    with counted(model) as calls, pytest.raises(ValueError, match="combines the predictions itself") as error:
        advanced(guider(guided(model, rule)), LEVELS["unet"])
    assert calls == []
    assert rule.name in str(error.value)
    assert "\n" not in str(error.value)


def test_any_other_guider_refuses_shapers():
    class OwnGuider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            return x * 0

    guider = OwnGuider(guided(tiny("unet"), APG()))
    guider.set_conds(POSITIVE, NEGATIVE)
    with pytest.raises(ValueError, match="OwnGuider"):
        advanced(guider, LEVELS["unet"])


@pytest.mark.parametrize("kind", KINDS)
def test_apg_in_one_step(kind):
    model, levels = tiny(kind), LEVELS[kind]
    rule = APG(eta=0.3, norm_threshold=1.0, momentum=-0.5)
    c, u = (model.model.process_latent_in(prediction(model, p, levels)) for p in (POSITIVE, NEGATIVE))
    update = projected_update((c - u).flatten(1), c.flatten(1), 0.3, 1.0).reshape(c.shape).float()
    expected = model.model.process_latent_out(c + 3.0 * update)
    assert close(advanced(cfg(guided(model, rule)), levels), expected)
    assert torch.equal(advanced(cfg(guided(model, rule), w=1.0), levels), advanced(cfg(model, w=1.0), levels))


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg_with_a_shaper(style):
    """APG shapes the update that this guider hands to the host's CFG function."""
    model, levels = tiny("unet"), LEVELS["unet"]
    p, t, n = (model.model.process_latent_in(prediction(model, c, levels)) for c in (POSITIVE, THIRD, NEGATIVE))

    def apg(c, u, w):
        return c + (w - 1) * projected_update((c - u).flatten(1), c.flatten(1), 0.0, 1.0).reshape(c.shape).float()

    expected = apg(t, n, 2.0) + (p - t) * 3.0 if style == "regular" else n + 2.0 * (apg(p, t, 3.0) - n)
    result = advanced(dual(guided(model, APG(norm_threshold=1.0)), style), levels)
    assert close(result, model.model.process_latent_out(expected))


@pytest.mark.parametrize("rules", [[], [APG()]], ids=["alone", "with APG"])
@pytest.mark.parametrize("guider", WITH_UNCOND)
def test_interval_leaves_the_positive_alone(guider, rules):
    model = tiny("unet")
    main = guided(model, GuidanceInterval(start_percent=1.0), *rules)
    with counted(model) as calls:
        result = advanced(guider(main), [2.0, 1.0, 0.0])
    assert calls == [1, 1]
    assert close(result, advanced(basic(model), [2.0, 1.0, 0.0]))


@pytest.mark.parametrize("guider", WITH_UNCOND)
def test_interval_gives_the_guider_its_weights_back(guider):
    model = tiny("unet")
    instance = guider(guided(model, GuidanceInterval(start_percent=1.0)))
    before = {name: getattr(instance, name, None) for name in ("cfg", "cfg1", "cfg2")}
    advanced(instance, LEVELS["unet"])
    assert {name: getattr(instance, name, None) for name in before} == before


# --- KSampler and KSamplerAdvanced -----------------------------------------------------------------------------------


def ksampler(model, **changes):
    latent = {"samples": empty_latent(model, 1, 8)}
    inputs = {"seed": 1, "steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "latent_image": latent}
    with torch.inference_mode():
        return call(nodes.KSampler, model=model, positive=POSITIVE, negative=NEGATIVE, **inputs | changes)["samples"]


def ksampler_advanced(model, latent, start, end, add_noise="enable", leftover="disable"):
    inputs = {
        "add_noise": add_noise, "noise_seed": 1, "steps": 6, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
        "start_at_step": start, "end_at_step": end, "return_with_leftover_noise": leftover, "latent_image": {"samples": latent},
    }  # fmt: skip
    with torch.inference_mode():
        return call(nodes.KSamplerAdvanced, model=model, positive=POSITIVE, negative=NEGATIVE, **inputs)["samples"]


@pytest.mark.parametrize("denoise", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_ksampler(kind, denoise):
    model = tiny(kind)
    rules = tools.all_rules(kind)
    latent = {"samples": torch.randn(empty_latent(model, 2, 8).shape, generator=torch.Generator().manual_seed(3))}
    result = ksampler(guided(model, *rules), denoise=denoise, latent_image=latent)
    assert close(result, ksampler(tools.reference(model, *rules), denoise=denoise, latent_image=latent))
    neutral = ksampler(guided(model, *tools.neutral_rules(kind)), denoise=denoise, latent_image=latent)
    assert torch.equal(neutral, ksampler(model, denoise=denoise, latent_image=latent))


@pytest.mark.parametrize("kind", KINDS)
def test_ksampler_advanced_in_two_parts(kind):
    """Without momentum, which starts afresh, two parts are the whole; windows count the whole schedule's percent."""
    model = tiny(kind)
    main = guided(model, APG(momentum=0.0), pag(model, start_percent=0.2), GuidanceInterval(end_percent=0.7))
    latent = empty_latent(model, 1, 8)
    with counted(model) as rows:
        whole = ksampler_advanced(main, latent, 0, 10000)
    with counted(model) as rows_of_parts:
        first = ksampler_advanced(main, latent, 0, 3, leftover="enable")
        second = ksampler_advanced(main, first, 3, 10000, add_noise="disable")
    assert close(second, whole)
    assert rows == rows_of_parts
    assert len(set(rows)) > 1
    assert log_of(main).steps == 3


def test_ksampler_advanced_forced_to_the_end():
    model = tiny("unet")
    rules = tools.all_rules("unet")
    latent = empty_latent(model, 1, 8)
    result = ksampler_advanced(guided(model, *rules), latent, 1, 4)
    assert close(result, ksampler_advanced(tools.reference(model, *rules), latent, 1, 4))
