"""What random graphs are made of: tiny models, among them two for video, and conditioning that has models of its own."""

from __future__ import annotations

import copy
import functools
from typing import Any, ClassVar

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from torch import Tensor

from lodestar.benchmarks import _tiny

CPU = torch.device("cpu")


class TinySVD(comfy.supported_models.SVD_img2vid):
    """The host's video UNet, whose batch axis is the frames."""

    unet_extra_config: ClassVar = {"num_heads": 4, "num_head_channels": -1}


_SVD = {
    **_tiny.UNET, "in_channels": 8, "use_temporal_attention": True, "use_temporal_resblock": True, "time_context_dim": _tiny.CONTEXT,
    "adm_in_channels": 768, "extra_ff_mix_layer": True, "use_spatial_context": True, "merge_strategy": "learned_with_images",
    "merge_factor": 0.0, "video_kernel_size": [3, 1, 1], "num_classes": "sequential",
}  # fmt: skip
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "ffn_dim": 64, "freq_dim": 32, "text_dim": _tiny.CONTEXT, "num_heads": 2,
    "num_layers": 3, "in_dim": 16, "out_dim": 16, "dtype": torch.float32,
}  # fmt: skip
_VIDEO = {"wan": (comfy.supported_models.WAN21_T2V, _WAN), "svd": (TinySVD, _SVD)}
KINDS = (*_tiny.KINDS, *_VIDEO)


def model(kind: str, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """A tiny model of one of KINDS, made and loaded once."""
    return _loaded(kind, seed)


@functools.cache
def _loaded(kind: str, seed: int) -> comfy.model_patcher.ModelPatcher:
    if kind in _tiny.KINDS:
        made = _tiny.build(kind, seed)
    else:
        family, settings = _VIDEO[kind]
        made = _tiny.patcher(family(dict(settings)).get_model({}, device=CPU), seed)
    comfy.model_management.load_models_gpu([made])  # the first time it writes attributes that stay
    return made


def forget_models() -> None:
    """Make all models anew: something was left on one."""
    _loaded.cache_clear()


def empty_latent(kind: str, batch: int, height: int, width: int, frames: int) -> Tensor:
    """Zeros of the shape that a model takes."""
    channels = model(kind).model.latent_format.latent_channels
    if kind == "wan":
        return torch.zeros(batch, channels, frames, height, width)
    return torch.zeros(batch, channels, height, width)


def prompt(kind: str, seed: int, frames: int) -> list:
    """A CONDITIONING that the model takes."""
    if kind != "svd":
        return _tiny.cond(seed)
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randn(1, 4, 8, 8, generator=generator)
    extra = {"motion_bucket_id": 127, "fps": 6, "augmentation_level": 0.0, "concat_latent_image": picture}
    return [[torch.randn(1, 1, _tiny.CONTEXT, generator=generator), {"pooled_output": torch.zeros(1, _tiny.CONTEXT), **extra}]]


def with_patch(patcher: Any, seed: int) -> Any:
    """A clone with the change of a weight that a LoRA makes."""
    clone = patcher.clone()
    key, delta = _change(patcher, seed)
    clone.add_patches({key: ("diff", (delta,))}, 1.0)
    return clone


def with_copied_options(patcher: Any) -> Any:
    """A clone whose options are copied deeply, as other packs do it."""
    clone = patcher.clone()
    clone.model_options = copy.deepcopy(clone.model_options)
    return clone


def _change(patcher: Any, seed: int) -> tuple[str, Tensor]:
    weights = patcher.model.state_dict()
    keys = [key for key in weights if key.startswith("diffusion_model.") and weights[key].ndim == 2]
    key = keys[len(keys) // 2]
    return key, 0.1 * torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(seed))


def hooked(conditioning: list, patcher: Any, seed: int) -> list:
    """Conditioning with a LoRA of its own."""
    key, delta = _change(patcher, seed)
    hooks = comfy.hooks.create_hook_lora({key: ("diff", (delta,))}, 1.0, 1.0)
    hooks.hooks[0].need_weight_init = False
    return comfy.hooks.set_hooks_for_conditioning(conditioning, hooks)


@functools.cache
def control_net() -> Any:
    """A tiny ControlNet of the host for the tiny UNet."""
    config = {name: value for name, value in _tiny.UNET.items() if name not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(
        **config, **_tiny.TinyUNet.unet_extra_config, hint_channels=3, device=CPU, operations=comfy.ops.disable_weight_init
    )
    _tiny.fill(network, 11)
    return comfy.controlnet.ControlNet(network.eval().requires_grad_(False), load_device=CPU)


def with_boxes(conditioning: list, patcher: Any) -> list:
    """Conditioning with one GLIGEN box in the upper left."""
    box = (torch.ones(1, _tiny.CONTEXT), 4, 4, 0, 0)
    return [[tensor, {**values, "gligen": ("position", _gligen(patcher.model), [box])}] for tensor, values in conditioning]


@functools.cache
def _gligen(network: Any) -> Any:
    stacks = [part for part in network.diffusion_model.modules() if type(part).__name__ == "SpatialTransformer"]
    layers = [comfy.gligen.GatedSelfAttentionDense(stack.in_channels, _tiny.CONTEXT, 4, stack.in_channels // 4) for stack in stacks]
    whole = comfy.gligen.Gligen(layers, comfy.gligen.PositionNet(_tiny.CONTEXT, _tiny.CONTEXT), _tiny.CONTEXT)
    _tiny.fill(whole, 12)
    return comfy.model_patcher.ModelPatcher(whole, load_device=CPU, offload_device=CPU)
