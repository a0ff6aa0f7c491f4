"""Every kind of conditioning that the host knows, with guidance: the same as the host's own separate evaluations."""

from __future__ import annotations

import pytest
import tools
import torch
from test_host_nodes import node
from tools import close, comfy, cond, counted, empty_latent, guided, node_helpers, pag, reference, sample, tiny

from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance

STEPS = 3
SIZE = 16


def with_values(conditioning, **values):
    return node_helpers.conditioning_set_values(conditioning, values)


def areas(model):
    return {"positive": cond(1) + with_values(cond(3), area=(8, 16, 0, 0), strength=0.8)}


def percentage_areas(model):
    return {"positive": cond(1) + with_values(cond(3), area=("percentage", 0.5, 0.5, 0.25, 0.25), strength=1.0)}


def masks(model):
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :, : SIZE // 2] = 1
    return {"positive": with_values(cond(1), mask=mask) + with_values(cond(3), mask=1 - mask, mask_strength=0.7)}


def mask_bounds(model):
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, 4:12, 4:12] = 1
    return {"positive": cond(1) + with_values(cond(3), mask=mask, set_area_to_bounds=True)}


def timestep_ranges(model):
    return {"positive": with_values(cond(1), start_percent=0.0, end_percent=0.4) + with_values(cond(3), start_percent=0.4, end_percent=1.0)}


def several_prompts(model):
    return {"positive": cond(1) + cond(3), "negative": cond(2) + cond(4)}


def longer_negative(model):
    return {"negative": cond(2, tokens=7)}


def noise_mask(model):
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 4:12] = 1
    return {"noise_mask": mask, "latent": torch.randn(empty_latent(model, 1, SIZE).shape, generator=torch.Generator().manual_seed(3))}


def partial_denoise(model):
    return {"denoise": 0.5, "latent": noise_mask(model)["latent"]}


def weight_hooks(model):
    """A LoRA for the positive prompt alone: the host then evaluates cond and uncond with different weights."""
    key = next(name for name in model.model.state_dict() if name.endswith(("attn2.to_v.weight", "attn.qkv.weight")))
    delta = 0.3 * torch.randn(model.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(5))
    hooks = comfy.hooks.create_hook_lora({key: ("diff", (delta,))}, 1.0, 1.0)
    hooks.hooks[0].need_weight_init = False
    return {"positive": comfy.hooks.set_hooks_for_conditioning(cond(1), hooks)}


def hook_schedule(model):
    conds = weight_hooks(model)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.0, 0.5)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    conds["positive"][0][1]["hooks"].set_keyframes_on_hooks(keyframes)
    return conds


EVERYWHERE = [
    areas, percentage_areas, masks, mask_bounds, timestep_ranges, several_prompts, noise_mask, partial_denoise, weight_hooks,
    hook_schedule,
]  # fmt: skip


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


def control_net(image_seed: int = 0):
    """A tiny ControlNet of the host for the tiny UNet, with its picture."""
    config = {name: value for name, value in tools.UNET.items() if name not in ("out_channels", "transformer_depth_output")}
    cpu = torch.device("cpu")
    network = comfy.cldm.cldm.ControlNet(
        **config, **tools.TinyUNet.unet_extra_config, hint_channels=3, device=cpu, operations=comfy.ops.disable_weight_init
    )
    tools.fill(network, seed=11)
    control = comfy.controlnet.ControlNet(network.eval().requires_grad_(False), load_device=cpu)
    picture = torch.rand(1, 3, SIZE * 8, SIZE * 8, generator=torch.Generator().manual_seed(image_seed))
    return control.set_cond_hint(picture, 0.5)


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


def video_cond(seed):
    return cond(seed, tokens=6, width=tools.CONTEXT)


def video_run(model, frames=5, **more):
    latent = torch.zeros(1, 16, frames, 4, 4)
    return sample(model, steps=STEPS, latent=latent, positive=video_cond(1), negative=video_cond(2), **more)


def windows(**changes):
    inputs = {
        "context_length": 3, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1, "closed_loop": False,
        "fuse_method": "pyramid", "dim": 2, "freenoise": False,
    }  # fmt: skip
    return node("nodes_context_windows", "ContextWindowsManualNode", **inputs | changes)


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


def packed_run(model, **more):
    video, audio = torch.zeros(1, 128, 2, 2, 2), torch.zeros(1, 8, 6, 16)
    nested = comfy.nested_tensor.NestedTensor
    noise = nested([torch.randn(part.shape, generator=torch.Generator().manual_seed(i)) for i, part in enumerate((video, audio))])
    conds = [cond(seed, tokens=4, width=128) for seed in (1, 2)]
    with torch.inference_mode():
        out = comfy.sample.sample(
            model, noise, STEPS, 4.0, "euler", "simple", *conds, nested([video, audio]), disable_pbar=True, seed=1, **more
        )
    return torch.cat([part.flatten() for part in out.unbind()])


def test_packed_latents_are_measured_part_by_part():
    model, weak = tiny("av"), tiny("av", seed=7)
    plain = packed_run(model)
    rules = [APG(momentum=-0.5, norm_threshold=2.0), Autoguidance(weak_model=weak, scale=1.5)]
    assert torch.equal(packed_run(guided(model, APG(eta=1.0, norm_threshold=0.0, momentum=0.0))), plain)
    result = packed_run(guided(model, *rules))
    assert not close(result, plain, 1e-2)
    assert close(result, packed_run(reference(model, *rules, parts=(128 * 8, 8 * 6 * 16))))
