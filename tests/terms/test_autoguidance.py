"""Autoguidance as a lerp, against diffusers, on two Gaussians, and against the host's DualModelGuider."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lodestar.guiders.engine.step import Step
from lodestar.guiders.spaces import Layout
from lodestar.guiders.terms.autoguidance import Autoguidance, autoguidance_update, check_weak_model

SCALES = [0.0, 0.5, 1.0, 1.7, 2.0, 3.0]
SHAPES = [(3, 4, 20), (3, 4, 8, 8), (3, 4, 3, 6, 5)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def guided(cond: Tensor, weak: Tensor, w: float, denoised: Tensor | None = None) -> Tensor:
    """What the rule makes of D (D_c if there is no CFG)."""
    rule = Autoguidance(weak_model="weak", scale=w)
    return rule.add(cond if denoised is None else denoised, cond, {rule.branches[0]: weak}, Step(0, 1.0, True, Layout()))


# --- the invariants, without a host ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("w", SCALES)
def test_it_is_a_lerp_from_the_weak_prediction(shape, w):
    cond, weak = random(*shape), random(*shape, seed=1)
    torch.testing.assert_close(guided(cond, weak, w), weak.lerp(cond, w))


def test_scale_1_is_the_main_model_and_0_the_weak_one():
    cond, weak = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1)
    assert guided(cond, weak, 1.0).equal(cond)
    torch.testing.assert_close(guided(cond, weak, 0.0), weak)
    assert Autoguidance(weak_model="weak", scale=1.0).neutral and not Autoguidance(weak_model="weak").neutral


@pytest.mark.parametrize("w", SCALES)
def test_identical_models_need_no_guidance(w):
    cond = random(3, 4, 8, 8)
    assert guided(cond, cond, w).equal(cond)


@pytest.mark.parametrize("w", SCALES)
def test_lerp_in_noise_space_is_lerp_in_denoised_space(w):
    x, sigma = random(3, 4, 8, 8, seed=2), 1.7
    cond, weak = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1)
    noise = lambda denoised: (x - denoised) / sigma  # noqa: E731
    torch.testing.assert_close(noise(guided(cond, weak, w)), noise(weak).lerp(noise(cond), w))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_with_cfg_it_is_the_papers_form_for_two_guides(alpha):
    """D_1 + (1 - a)(g - 1)(D_1 - D_1(no prompt)) + a (g - 1)(D_1 - D_0)."""
    cond, uncond, weak = (random(3, 4, 8, 8, seed=i) for i in range(3))
    g = 3.0
    cfg = uncond.lerp(cond, 1 + (1 - alpha) * (g - 1))
    expected = cond + (1 - alpha) * (g - 1) * (cond - uncond) + alpha * (g - 1) * (cond - weak)
    torch.testing.assert_close(guided(cond, weak, 1 + alpha * (g - 1), denoised=cfg), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays(dtype):
    cond, weak = random(3, 4, 8, 8, dtype=dtype), random(3, 4, 8, 8, seed=1, dtype=dtype)
    out = guided(cond, weak, 2.0)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), weak.double().lerp(cond.double(), 2.0), rtol=0.02, atol=0.05)


def variance(w: float, s: float) -> float:
    """Of samples of the guided N(0, 1) with N(0, s^2) as the weak model, by an Euler integration of the ODE."""
    sigmas = torch.logspace(2, -3, 2000, dtype=torch.float64)
    x = sigmas[:1]  # one standard deviation; the ODE is linear in x
    for sigma, following in pairwise(sigmas):
        main, weak = x / (1 + sigma**2), x * s**2 / (s**2 + sigma**2)
        denoised = main + autoguidance_update(main, weak, w)
        x = x + (following - sigma) * (x - denoised) / sigma
    return x.square().item()


@pytest.mark.parametrize(("w", "s"), [(1.0, 1.5), (1.5, 1.5), (2.0, 1.2), (2.0, 1.5), (3.0, 1.5)])
def test_two_gaussians(w, s):
    """With the score w s_1 + (1 - w) s_0 the ODE separates: x^2 is proportional to (1 + sigma^2)^w (s^2 + sigma^2)^(1 - w)."""
    start = 100.0
    closed = (start**2) * ((1 / (1 + start**2)) ** w) * ((s**2 / (s**2 + start**2)) ** (1 - w))
    assert variance(w, s) == pytest.approx(closed, rel=0.02)
    assert (variance(w, s) < 0.99) == (w > 1)


# --- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [0.5, 1.7, 3.0])
def test_equals_diffusers(w):
    """Their scale is w, or w - 1 in their original formulation."""
    from diffusers.guiders import AutoGuidance

    cond, weak = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1)
    for scale, original in ((w, False), (w - 1, True)):
        guider = AutoGuidance(scale, auto_guidance_layers=0, dropout=0.1, use_original_formulation=original)
        torch.testing.assert_close(guider.forward(cond, weak).pred, guided(cond, weak, w))


# --- the models ------------------------------------------------------------------------------------------------------


def fake(latent_format: type) -> SimpleNamespace:
    return SimpleNamespace(model=SimpleNamespace(latent_format=latent_format()))


class SixteenChannels:
    latent_channels = 16


class FourChannels:
    latent_channels = 4


class AlsoFourChannels:
    latent_channels = 4


def test_models_of_other_latents_are_refused_by_name():
    check_weak_model(fake(FourChannels), fake(FourChannels))
    for other in (SixteenChannels, AlsoFourChannels):
        with pytest.raises(ValueError, match=rf"FourChannels \(4 channels\).*{other.__name__}"):
            check_weak_model(fake(FourChannels), fake(other))


@pytest.mark.parametrize("kind", ["unet", "unet_v", "mmdit"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_equals_the_hosts_dual_model_guider(host, kind, sampler):
    """The host's guider with the weak model as its negative model and the positive prompt in both places."""
    import comfy.samplers
    import comfy_extras.nodes_custom_sampler
    import tools

    guider_class = getattr(comfy_extras.nodes_custom_sampler, "Guider_DualModel", None)
    if guider_class is None:
        pytest.skip("this host has no DualModelGuider")
    model, weak = tools.tiny(kind), tools.tiny(kind, seed=7)
    ours = tools.sample(tools.guided(model, Autoguidance(weak_model=weak, scale=2.1)), cfg=1.0, sampler=sampler)
    guider = guider_class(model, weak)
    guider.set_conds(tools.cond(1), tools.cond(1))
    guider.set_cfg(2.1)
    latent = tools.empty_latent(model)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)
    noise = comfy.sample.prepare_noise(latent, 1)
    with torch.inference_mode():
        theirs = guider.sample(noise, latent, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=1)
    assert tools.close(ours, theirs.to(ours.device))
    assert not tools.close(ours, tools.sample(model, cfg=1.0, sampler=sampler), 1e-2)


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_at_scale_1_the_weak_model_is_never_called(host, kind):
    import tools

    model, weak = tools.tiny(kind), tools.tiny(kind, seed=7)
    with tools.counted(weak) as rows:
        out = tools.sample(tools.guided(model, Autoguidance(weak_model=weak, scale=1.0)))
    assert not rows and out.equal(tools.sample(model))


def test_the_same_model_twice_is_no_guidance(host):
    import tools

    model, twin = tools.tiny("unet"), tools.tiny("unet")
    guided_model = tools.guided(model, Autoguidance(weak_model=twin, scale=3.0))
    assert tools.close(tools.sample(guided_model), tools.sample(model), 1e-5)


def test_outside_its_window_the_weak_model_is_not_called(host):
    import tools

    model, weak = tools.tiny("unet"), tools.tiny("unet", seed=7)
    with tools.counted(weak) as rows:
        tools.sample(tools.guided(model, Autoguidance(weak_model=weak, start_percent=0.3, end_percent=0.6)), steps=10)
    assert 0 < len(rows) < 10
