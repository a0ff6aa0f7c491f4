"""Restoration in the host's sampling: both modes, on latents and on pictures."""

from __future__ import annotations

import gc
import weakref

import pytest
import tools
import torch
from conditioning_tools import control_net, with_values
from restoration_tools import measured, pictures, pixel_model, tiny_vae

from lodestar.guiders.cfgpp.sampler import cfgpp_sampler
from lodestar.guiders.engine.keys import LODESTAR
from lodestar.guiders.restoration import psld
from lodestar.guiders.restoration.operators import JPEG, Blur, Inpaint, gaussian_kernel
from lodestar.guiders.restoration.rule import MODES, Restoration
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.spaces import level_of

CHANNELS = {"unet": 4, "unet_v": 4, "mmdit": 16}


@pytest.fixture(scope="module")
def vaes():
    """By the number of channels."""
    return {channels: tiny_vae(channels) for channels in (4, 16)}


def restored(model, *before, **settings):
    """The pixel model, or one with a VAE, with rules and Restoration behind them."""
    return tools.guided(model, *before, Restoration(**{"measurement": measured()} | settings))


def sample(model, batch=1, size=16, **more):
    """Few steps without CFG."""
    channels = model.model.latent_format.latent_channels
    return tools.sample(model, **{"cfg": 1.0, "steps": 3, "latent": torch.zeros(batch, channels, size, size)} | more)


def error(model, latent, vae=None, measurement=None):
    """|| A x - y || / || y || of a result."""
    measurement = measurement or measured()
    with torch.inference_mode():
        x = (latent if vae is None else vae.decode(latent).movedim(-1, 1) * 2 - 1).float()
    return float((measurement.operator.apply(x) - measurement.y).norm() / measurement.y.norm())


# --- what it does, and what it costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_pictures_agree_with_the_measurement(mode):
    model = pixel_model()
    guided = restored(model, mode=mode)
    with tools.counted(model) as rows:
        found = sample(guided, steps=6)
    log = tools.log_of(guided)
    assert error(model, found) < 0.1 * error(model, sample(model, steps=6))
    assert log.nfe == len(rows) == (6 if mode == "decoupled" else 12)
    assert log.spent == ({} if mode == "decoupled" else {"backward": 6})
    curve = tools.curves_of(log)["measurement error"]
    assert list(curve) == list(range(6)) and curve[5] < curve[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CHANNELS)
def test_latents_come_nearer_to_the_measurement(vaes, kind, mode):
    """eps, v and flow, UNet and transformer, through a VAE whose weights are inference tensors."""
    model, vae, measurement = tools.tiny(kind), vaes[CHANNELS[kind]], measured(size=64)
    guided = restored(model, measurement=measurement, vae=vae, mode=mode, iterations=2)
    found, plain = sample(guided, size=8), sample(model, size=8)
    assert error(model, found, vae, measurement) < error(model, plain, vae, measurement)
    spent = {"decodes": 12, "backward": 6} if mode == "decoupled" else {"decodes": 3, "encodes": 3, "backward": 3}
    assert tools.log_of(guided).spent == spent


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_strength_0_costs_nothing_and_changes_no_bit(vaes, strength):
    model, vae = tools.tiny("unet"), vaes[4]
    guided = restored(model, measurement=measured(size=64), vae=vae, strength=strength, iterations=1)
    calls = []
    decode = vae.first_stage_model.decode
    vae.first_stage_model.decode = lambda z: calls.append(1) or decode(z)
    try:
        same = sample(guided, size=8).equal(sample(model, size=8))
    finally:
        del vae.first_stage_model.decode
    assert same == (not calls) == (strength == 0)
    assert len(guided.get_additional_models_with_key(LODESTAR)) == (0 if strength == 0 else 1)


def test_the_gradient_of_psld_by_hand():
    """Of the first step: autograd through the host's evaluation without checkpoints, on weights of its own."""
    model, seen = pixel_model(), []
    guided = restored(model, mode="psld", strength=0.02, gluing=0.01)
    guided.set_model_sampler_post_cfg_function(lambda args: seen.append(args) or args["denoised"])
    sample(guided, steps=4)
    args, schedule = seen[0], tools.log_of(guided).sigmas
    model.model.current_patcher = model
    x = args["input"].clone().requires_grad_()
    conds = [{**args["cond"][0], "model_conds": {k: type(v)(v.cond.clone()) for k, v in args["cond"][0]["model_conds"].items()}}]
    estimate = tools.comfy.samplers.calc_cond_batch(model.model, [conds], x, args["sigma"].clone(), {"transformer_options": {}})[0]
    measurement = measured()
    matrix = measurement.operator
    picture = estimate / 2  # the latent format's scale
    miss = matrix.apply(picture) - measurement.y
    glued = matrix.transpose(measurement.y) + picture - matrix.transpose(matrix.apply(picture))
    value = 0.02 * miss.norm() + 0.01 * (2 * glued - estimate).norm()
    (gradient,) = torch.autograd.grad(value, x)
    levels = level_of(schedule[0], False), level_of(schedule[1], False)
    expected = args["cond_denoised"] + psld.update(gradient, value.detach()[None], *levels, 4, True)
    assert tools.close(args["denoised"], expected, 1e-4)
    assert not tools.close(args["denoised"], args["cond_denoised"], 1e-2)


def test_psld_asks_once_in_a_step_of_two_stages():
    guided = restored(pixel_model(), mode="psld")
    sample(guided, sampler="heun", steps=3)
    log = tools.log_of(guided)
    assert log.spent["backward"] == 3 and log.nfe == 5 + 3


@pytest.mark.parametrize("mode", MODES)
def test_a_second_run_is_the_same_and_so_is_each_picture_of_a_batch(mode):
    model, two, first = pixel_model(), measured(2), measured(2)
    guided = restored(model, measurement=two, mode=mode)
    both = sample(guided, batch=2)
    assert sample(guided, batch=2).equal(both)
    alone = restored(model, measurement=type(first)(first.operator, first.y[:1], 16, 16, 0.0), mode=mode)
    assert tools.close(both[:1], sample(alone))
    shared = sample(restored(model, measurement=measured(), mode=mode), batch=2)
    assert tools.close(both[:1], shared[:1]) and not tools.close(both[1:], shared[1:], 1e-2)


HALF = (torch.arange(16) < 9).float().expand(1, 1, 16, 16)


@pytest.mark.parametrize("operator", [Inpaint(HALF), Blur(gaussian_kernel(7, 1.5)), JPEG(30)])
def test_every_kind_of_operator_guides(operator):
    model, measurement = pixel_model(), measured(operator=operator)
    found = sample(restored(model, measurement=measurement), steps=6)
    assert error(model, found, measurement=measurement) < 0.5 * error(model, sample(model, steps=6), measurement=measurement)


def test_the_window():
    guided = restored(pixel_model(), mode="psld", start_percent=0.5)
    sample(guided, steps=6)
    assert 0 < tools.log_of(guided).spent["backward"] < 6


def test_nothing_lives_on_after_a_run():
    guided = restored(pixel_model(), mode="psld")
    runs = []
    guided.set_model_sampler_post_cfg_function(
        lambda args: runs.append(weakref.ref(args["model_options"]["transformer_options"]["lodestar_run"])) or args["denoised"]
    )
    gc.disable()
    try:
        sample(guided)
        assert runs[0]() is None
    finally:
        gc.enable()


# --- with others -----------------------------------------------------------------------------------------------------


def cfgpp(model):
    """Sampled by the CFG++ Sampler."""
    latent = torch.zeros(1, 3, 16, 16)
    noise = tools.comfy.sample.prepare_noise(latent, 1)
    sigmas = tools.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    conds = tools.cond(1), tools.cond(2)
    with torch.inference_mode():
        return tools.comfy.sample.sample_custom(
            model, noise, 1.0, cfgpp_sampler("euler", 0.6), sigmas, *conds, latent, disable_pbar=True, seed=1
        )


PARTNERS = {
    "PAG": (lambda model: [tools.pag(model)], sample),
    "APG": (lambda model: [APG()], lambda model: sample(model, cfg=4.0)),
    "autoguidance": (lambda model: [tools.Autoguidance(weak_model=pixel_model(7), scale=1.5)], sample),
    "CFG++": (lambda model: [], cfgpp),
    "the host's CFG++": (lambda model: [], lambda model: sample(model, cfg=0.6, sampler="euler_cfg_pp")),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("partner", PARTNERS)
def test_it_goes_together_with(partner, mode):
    """The result is near the measurement, and the partner still counts."""
    model = pixel_model()
    rules, run = PARTNERS[partner]
    found, alone = run(restored(model, *rules(model), mode=mode)), sample(restored(model, mode=mode))
    assert found.isfinite().all() and not tools.close(found, alone, 1e-3)
    assert error(model, found) < 0.5 * error(model, sample(model))


@pytest.mark.parametrize("mode", MODES)
def test_control_net(vaes, mode):
    """Its weights are inference tensors too, and the gradient goes through it."""
    model, measurement = tools.tiny("unet"), measured(size=128)
    with torch.inference_mode():
        positive = with_values(tools.cond(1), control=control_net(), control_apply_to_uncond=True)
    guided = restored(model, measurement=measurement, vae=vaes[4], mode=mode, iterations=1)
    found, plain = sample(guided, positive=positive, steps=2), sample(model, positive=positive, steps=2)
    assert error(model, found, vaes[4], measurement) < error(model, plain, vaes[4], measurement)
    assert not tools.close(found, sample(guided, steps=2), 1e-3)


SAMPLERS = {"decoupled": ("dpm_2_ancestral", "dpmpp_2m_sde", "uni_pc", "lcm", "res_multistep"), "psld": ("euler_ancestral", "dpmpp_2m")}


@pytest.mark.parametrize("mode", MODES)
def test_samplers_of_the_host_are_finite(mode):
    model = restored(pixel_model(), mode=mode, iterations=1)
    for sampler in SAMPLERS[mode]:
        assert sample(model, sampler=sampler, steps=2).isfinite().all(), sampler


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "run", "message"),
    [
        ({}, {"size": 32}, "one of a picture of 16x16 pixels, and the latent makes one of 32x32"),
        ({"measurement": measured(3)}, {"batch": 2}, "there are 3 measurements and 2 latents"),
        ({}, {"latent": torch.zeros(1, 3, 5, 16, 16)}, "works on pictures, and this latent is a video"),
    ],
)
def test_measurements_of_something_else(settings, run, message):
    with pytest.raises(ValueError, match=f"^Restoration.*{message}.*\\.$"):
        sample(restored(pixel_model(), **settings), **run)


def test_vaes_that_do_not_belong_to_the_model(vaes):
    with pytest.raises(ValueError, match=r"^Restoration: this model works on latents.* connect its VAE to vae\.$"):
        sample(restored(tools.tiny("unet")))
    with pytest.raises(ValueError, match=r"latents \(SD15\) have 4 channels, and this VAE makes 3 colours out of 16; .*\.$"):
        sample(restored(tools.tiny("unet"), vae=vaes[16]))


def test_psld_needs_every_forward_pass():
    from comfy_extras.nodes_easycache import EasyCacheNode

    model = EasyCacheNode.execute(pixel_model(), 0.3, 0.15, 0.95, False).result[0]
    with pytest.raises(ValueError, match=r"^Restoration: the mode psld needs .* bypass EasyCache, or choose decoupled\.$"):
        sample(restored(model, mode="psld"))
    assert sample(restored(model)).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_sizes_that_would_need_tiles(vaes, mode, monkeypatch):
    monkeypatch.setattr(tools.comfy.model_management, "get_total_memory", lambda device: 10 * 2**20)
    guided = restored(tools.tiny("unet"), vae=vaes[4], measurement=measured(size=64), mode=mode)
    with pytest.raises(ValueError, match=r"of 64x64 pixels need about \d\.\d GiB without tiles, .* take a smaller picture\.$"):
        sample(guided, size=8)


def test_pictures_are_those_of_the_seed():
    """What all of the above measures is no constant."""
    assert pictures().std() > 0.1 and pictures().equal(pictures()) and not pictures(seed=6).equal(pictures())
