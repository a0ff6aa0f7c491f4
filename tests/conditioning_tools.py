"""The host's nodes as functions on models, and every kind of conditioning that it knows.

Importing this loads the host.
"""

from __future__ import annotations

import importlib

import pytest
import tools
import torch
from tools import comfy, comfyui_version, cond, empty_latent, node_helpers, sample

from workshop.hosting import OLDEST, as_numbers

STEPS = 3
SIZE = 16


def node(module: str, name: str, since: str = OLDEST.comfyui, **inputs):
    """A function model -> model that executes one of the host's nodes; on a host older than ``since`` it skips the test.

    Where the node is gone or takes other inputs, the test fails: then the list that it comes from has to be looked through.
    """

    def apply(model):
        if as_numbers(comfyui_version.__version__) < as_numbers(since):
            pytest.skip(f"{apply.__name__} came with ComfyUI {since}")
        cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
        result = (getattr(cls, "execute", None) or cls().patch)(model, **inputs)
        return result[0] if isinstance(result, tuple) else result.result[0]

    apply.__name__ = name + "".join(f" {key}" for key, value in inputs.items() if value is True)
    return apply


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
