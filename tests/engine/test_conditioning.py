"""Every kind of conditioning that the host knows, with guidance: the same as the host's own separate evaluations."""

from __future__ import annotations

import pytest
import tools
import torch
from conditioning_tools import (
    EVERYWHERE,
    SIZE,
    STEPS,
    control_net,
    longer_negative,
    node,
    noise_mask,
    packed_run,
    video_run,
    weight_hooks,
    windows,
    with_values,
)
from tools import close, comfy, cond, counted, empty_latent, guided, pag, reference, sample, tiny

from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance


def run(model, **more):
    more.setdefault("latent", empty_latent(model, 1, SIZE))
    return sample(model, steps=STEPS, **more)


@pytest.mark.parametrize("conditioning", EVERYWHERE, ids=lambda function: function.__name__)
@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_conditioning(kind, conditioning):
    model = tiny(kind)
    changes = conditioning(model)
    rules = tools.all_rules(kind)
    if "hook" in conditioning.__name__:  # the reference does not load hooks into the weak model
        rules = rules[:2]
    plain = run(model, **changes)
    assert not close(plain, run(model, **{name: value for name, value in changes.items() if name == "latent"}), 1e-3)
    assert close(run(guided(model, *rules), **changes), run(reference(model, *rules), **changes), 3e-4)
    assert torch.equal(run(guided(model, *tools.neutral_rules(kind)), **changes), plain)
    assert torch.equal(run(model, **changes), plain)


def test_conds_of_different_lengths():
    model = tiny("unet")
    rules = tools.all_rules("unet")
    changes = longer_negative(model)
    assert close(run(guided(model, *rules), **changes), run(reference(model, *rules), **changes))


def test_weight_hooks_reach_the_weak_model():
    """Its positive conditioning is the main model's, LoRA and all: then it is the main model's twin, and there is nothing to guide."""
    model, twin = tiny("unet"), tiny("unet")
    changes = weight_hooks(model)
    plain = run(model, cfg=1.0, **changes)
    assert not close(plain, run(model, cfg=1.0), 1e-3)
    assert close(run(guided(model, Autoguidance(weak_model=twin, scale=3.0)), cfg=1.0, **changes), plain)
    assert twin.hook_patches == {}


def test_differential_diffusion():
    model = tiny("unet")
    differential = node("nodes_differential_diffusion", "DifferentialDiffusion")(model)
    changes = noise_mask(model)
    changes["noise_mask"] = torch.linspace(0, 1, SIZE).expand(1, 1, SIZE, SIZE)
    rules = tools.all_rules("unet")
    assert close(run(guided(differential, *rules), **changes), run(reference(differential, *rules), **changes))


# --- ControlNet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [("positive",), ("positive", "negative")], ids="+".join)
def test_control_net(on):
    model = tiny("unet")
    conds = {name: cond(i) for i, name in enumerate(("positive", "negative"), start=1)}
    control = control_net()
    conds |= {name: with_values(conds[name], control=control, control_apply_to_uncond=False) for name in on}
    plain = run(model, **conds)
    assert not close(plain, run(model), 1e-3)
    rules = tools.all_rules("unet")
    with counted(model) as rows:
        result = run(guided(model, *rules), **conds)
    assert rows == ([3] if len(on) == 2 else [2, 1]) * STEPS
    assert close(result, run(reference(model, *rules), **conds), 3e-4)
    assert torch.equal(run(guided(model, *tools.neutral_rules("unet")), **conds), plain)


def test_a_chain_of_control_nets_takes_the_extra_rows():
    model = tiny("unet")
    chain = control_net(1).set_previous_controlnet(control_net(2))
    conds = {name: with_values(cond(i), control=chain) for i, name in enumerate(("positive", "negative"), start=1)}
    rules = [APG(), pag(model)]
    assert close(run(guided(model, *rules), **conds), run(reference(model, *rules), **conds), 3e-4)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_a_batch_of_two_is_two_single_runs(kind, sampler):
    """The clamp of APG is per sample, so that company changes nobody's result."""
    model = tiny(kind)
    main = guided(model, APG(norm_threshold=3.0), pag(model, rescale=0.5))
    noise = torch.randn(empty_latent(model, 2, 8).shape, generator=torch.Generator().manual_seed(3))
    noise[1] *= 1.5

    def with_noise(noise):
        with torch.inference_mode():
            return comfy.sample.sample(
                main, noise, STEPS, 4.0, sampler, "normal", cond(1), cond(2), torch.zeros_like(noise), disable_pbar=True, seed=1
            )

    both = with_noise(noise)
    for i in range(2):
        assert close(both[i : i + 1], with_noise(noise[i : i + 1]))


# --- video, packed latents, context windows --------------------------------------------------------------------------


def video_rules():
    return [APG(momentum=-0.5), pag(tiny("wan")), Autoguidance(weak_model=tiny("wan", seed=7), scale=1.5)]


def test_video_latents():
    model = tiny("wan")
    rules = video_rules()
    plain = video_run(model)
    result = video_run(guided(model, *rules))
    assert not close(result, plain, 1e-2)
    assert close(result, video_run(reference(model, *rules)))
    assert torch.equal(video_run(guided(model, *neutral_video_rules())), plain)


def neutral_video_rules():
    return [APG(eta=1.0, norm_threshold=0.0, momentum=0.0), pag(tiny("wan"), 0.0)]


@pytest.mark.parametrize("fuse", ["pyramid", "relative"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_context_windows(order, fuse):
    model = tiny("wan")
    patch, rules = windows(fuse_method=fuse), video_rules()
    plain = video_run(patch(model), frames=7)
    assert not close(plain, video_run(model, frames=7), 1e-3)
    main = guided(patch(model), *rules) if order == "before" else patch(guided(model, *rules))
    with counted(model) as rows:
        result = video_run(main, frames=7)
    assert set(rows) == {3}
    assert close(result, video_run(reference(patch(model), *rules), frames=7), 3e-4)
    assert torch.equal(video_run(guided(patch(model), *neutral_video_rules()), frames=7), plain)


def test_context_windows_over_a_batch_of_pictures():
    model = tiny("unet")
    patch, rules = windows(dim=0), tools.all_rules("unet")
    latent = empty_latent(model, 5, 8)
    result = run(guided(patch(model), *rules), latent=latent)
    assert close(result, run(reference(patch(model), *rules), latent=latent), 3e-4)


def test_packed_latents_are_measured_part_by_part():
    model, weak = tiny("av"), tiny("av", seed=7)
    plain = packed_run(model)
    rules = [APG(momentum=-0.5, norm_threshold=2.0), tools.pag(model), Autoguidance(weak_model=weak, scale=1.5)]
    assert torch.equal(packed_run(guided(model, APG(eta=1.0, norm_threshold=0.0, momentum=0.0))), plain)
    result = packed_run(guided(model, *rules))
    assert not close(result, plain, 1e-2)
    assert close(result, packed_run(reference(model, *rules, parts=(128 * 8, 8 * 6 * 16))))
