"""The demo models as the host's own objects: a UNet (eps) and an MMDiT (flow), each in a strong and a weak version.

Nothing here is a special case for the host: the networks are its UNetModel and MMDiT, in small, inside its ModelPatcher.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.supported_models_base import ClipTarget
from einops import rearrange

from .text import LENGTH, WIDTH, CaptionEncoder, CaptionTokenizer

WEIGHTS = Path(__file__).parent / "weights"
MODELS = ("unet", "mmdit")
STRENGTHS = ("main", "weak")


class ShapesLatent(comfy.latent_formats.LatentFormat):
    """Pixels in [-1, 1], scaled to about unit variance."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    scale_factor = 2.0
    latent_rgb_factors = ((0.25, 0.0, 0.0), (0.0, 0.25, 0.0), (0.0, 0.0, 0.25))


class PatchedUNet(UNetModel):
    """The host's UNet on 2x2 pixel patches (space to depth): a quarter of the work of a pixel-level UNet."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = super().forward(rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2), *args, **kwargs)
        return rearrange(out, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)


class _UNetBase(comfy.model_base.BaseModel):
    def __init__(self, config: Any, device: object = None) -> None:
        super().__init__(config, comfy.model_base.ModelType.EPS, device=device, unet_model=PatchedUNet)

    def encode_adm(self, **kwargs: Any) -> torch.Tensor:
        return kwargs["pooled_output"]


class ShapesUNet(comfy.supported_models.SD15):
    """A UNet with self- and cross-attention at 16x16 and 8x8 and in the middle; eps prediction."""

    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}
    latent_format = ShapesLatent
    supported_inference_dtypes = (torch.float32,)

    def get_model(self, state_dict: dict, prefix: str = "", device: object = None) -> comfy.model_base.BaseModel:
        return _UNetBase(self, device=device)


class ShapesMMDiT(comfy.supported_models.SD3):
    """SD3's joint transformer on 4x4 pixel patches; flow matching."""

    sampling_settings = {"shift": 1.0}
    latent_format = ShapesLatent
    supported_inference_dtypes = (torch.float32,)

    def inpaint_model(self) -> bool:
        return False


def _unet_config(multipliers: tuple[int, int]) -> dict[str, Any]:
    return {
        "image_size": 16, "in_channels": 12, "out_channels": 12, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": multipliers, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
        "use_spatial_transformer": True, "use_linear_in_transformer": True, "context_dim": WIDTH, "legacy": False,
        "num_classes": "sequential", "adm_in_channels": WIDTH, "dtype": torch.float32,
    }  # fmt: skip


def _mmdit_config(width: int, blocks: int) -> dict[str, Any]:
    return {
        "input_size": None, "patch_size": 4, "in_channels": 3, "depth": width, "num_blocks": blocks, "num_patches": None,
        "pos_embed_max_size": 64, "pos_embed_scaling_factor": None, "adm_in_channels": WIDTH, "qk_norm": "rms",
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 64 * width}},
        "dtype": torch.float32,
    }  # fmt: skip


_CONFIGS = {
    ("unet", "main"): lambda: ShapesUNet(_unet_config((1, 3))),
    ("unet", "weak"): lambda: ShapesUNet(_unet_config((1, 1))),
    ("mmdit", "main"): lambda: ShapesMMDiT(_mmdit_config(2, 6)),
    ("mmdit", "weak"): lambda: ShapesMMDiT(_mmdit_config(1, 4)),
}


def build(model: str, strength: str) -> comfy.model_base.BaseModel:
    """The host's model object with uninitialised weights."""
    network = _CONFIGS[model, strength]().get_model({}, device=torch.device("cpu"))
    network.eval()
    return network


def load_model(model: str, strength: str) -> comfy.model_patcher.ModelPatcher:
    """One of the four embedded models, ready for the host's samplers."""
    network = build(model, strength)
    weights = comfy.utils.load_torch_file(str(WEIGHTS / f"{model}_{strength}.safetensors"))
    network.diffusion_model.load_state_dict({name: value.float() for name, value in weights.items()})
    return comfy.model_patcher.ModelPatcher(
        network, load_device=comfy.model_management.get_torch_device(), offload_device=comfy.model_management.unet_offload_device()
    )


def load_clip() -> comfy.sd.CLIP:
    """The caption encoder as the host's CLIP object."""
    state = comfy.utils.load_torch_file(str(WEIGHTS / "words.safetensors"))
    return comfy.sd.CLIP(ClipTarget(CaptionTokenizer, CaptionEncoder), parameters=LENGTH * WIDTH, state_dict=state)


def load_vae() -> comfy.sd.VAE:
    """The host's pixel-space VAE: pictures are their own latents."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
