"""The demo models as the host's own objects: a UNet (eps) and an MMDiT (flow), each in a strong and a weak version.

Nothing here is a special case for the host: the networks are its UNetModel and MMDiT, in small, inside its ModelPatcher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.supported_models_base import ClipTarget
from einops import rearrange

from .shapes import SIZE
from .text import LENGTH, WIDTH, CaptionEncoder, CaptionTokenizer

WEIGHTS = Path(__file__).parent / "weights"
MODELS = ("unet", "mmdit")
STRENGTHS = ("main", "weak")
PATCH = 4
SCHEDULERS = {"unet": "normal", "mmdit": "simple"}  # what the host's users take for eps and for flow models


class ShapesLatent(comfy.latent_formats.LatentFormat):
    """Pixels in [-1, 1], scaled to about unit variance."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    scale_factor = 2.0
    latent_rgb_factors = ((0.25, 0.0, 0.0), (0.0, 0.25, 0.0), (0.0, 0.0, 0.25))


class PatchedUNet(UNetModel):
    """The host's UNet on 4x4 pixel patches (space to depth, a small part of the work of a pixel-level UNet), with a preconditioned output.

    The stem also sees where in the picture a patch lies, as a transformer's position embedding would tell it.
    eps = s x + sqrt(1 - s^2) F(x) with s = sigma / sqrt(sigma^2 + 1), x the host's unit-variance input and F the network: what EDM's
    c_skip and c_out (Karras et al. 2022, table 1) are for an eps model. An error of F then reaches x0 undiminished but not magnified.
    """

    patch_size = PATCH

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sigmas = comfy.model_sampling.ModelSamplingDiscrete().sigmas
        self.register_buffer("skip", sigmas / (sigmas**2 + 1).sqrt(), persistent=False)

    def _forward(self, x: torch.Tensor, timesteps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the host's forward calls inside of other packs' wrappers, which expect as many channels to come out as go in."""
        side = self.patch_size
        patches = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=side, q=side)
        patches = torch.cat([patches, _places(patches).expand(len(x), -1, -1, -1)], dim=1)
        out = rearrange(super()._forward(patches, timesteps, *args, **kwargs), "b (c p q) h w -> b c (h p) (w q)", p=side, q=side)
        skip = self.skip[timesteps.round().long().clamp(0, len(self.skip) - 1)][:, None, None, None]
        return skip * x + (1 - skip**2).sqrt() * out


def _places(patches: torch.Tensor) -> torch.Tensor:
    """Position channels [1, 8, H, W] for patches [B, C, H, W]: x, y in [-1, 1] and a few of their harmonics."""
    axes = [torch.linspace(-1, 1, size, device=patches.device, dtype=patches.dtype) for size in patches.shape[-2:]]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    waves = [grid, (math.pi * grid).sin(), (math.pi * grid).cos(), (2 * math.pi * grid).cos()]
    return torch.cat(waves)[None]


class _UNetBase(comfy.model_base.BaseModel):
    def __init__(self, config: Any, device: object = None) -> None:
        super().__init__(config, comfy.model_base.ModelType.EPS, device=device, unet_model=PatchedUNet)

    def encode_adm(self, **kwargs: Any) -> torch.Tensor:
        return kwargs["pooled_output"]


class ShapesUNet(comfy.supported_models.SD15):
    """A UNet with self- and cross-attention at 8x8 and 4x4 patches and in the middle; eps prediction."""

    native_size = SIZE
    unet_extra_config: ClassVar = {"num_heads": -1, "num_head_channels": 32}
    latent_format = ShapesLatent
    supported_inference_dtypes = (torch.float32,)

    def inpaint_model(self) -> bool:
        return False

    def get_model(self, state_dict: dict, prefix: str = "", device: object = None) -> comfy.model_base.BaseModel:
        return _UNetBase(self, device=device)


class ShapesMMDiT(comfy.supported_models.SD3):
    """SD3's joint transformer on 4x4 pixel patches; flow matching."""

    native_size = SIZE
    sampling_settings: ClassVar = {"shift": 1.0}
    latent_format = ShapesLatent
    supported_inference_dtypes = (torch.float32,)

    def inpaint_model(self) -> bool:
        return False


def unet_config(channels: int, depth: int) -> dict[str, Any]:
    return {
        "image_size": 8, "in_channels": 3 * PATCH**2 + 8, "out_channels": 3 * PATCH**2, "model_channels": channels,
        "num_res_blocks": [1, 1], "channel_mult": (1, 1), "transformer_depth": [depth, 1],
        "transformer_depth_output": [depth, depth, 1, 1], "transformer_depth_middle": 1, "use_scale_shift_norm": True,
        "use_spatial_transformer": True, "use_linear_in_transformer": True, "context_dim": WIDTH, "legacy": False,
        "num_classes": "sequential", "adm_in_channels": WIDTH, "dtype": torch.float32,
    }  # fmt: skip


def mmdit_config(width: int, blocks: int) -> dict[str, Any]:
    return {
        "input_size": None, "patch_size": PATCH, "in_channels": 3, "depth": width, "num_blocks": blocks, "num_patches": None,
        "pos_embed_max_size": 64, "pos_embed_scaling_factor": None, "adm_in_channels": WIDTH, "qk_norm": "rms",
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 64 * width}},
        "dtype": torch.float32,
    }  # fmt: skip


_CONFIGS = {
    ("unet", "main"): lambda: ShapesUNet(unet_config(64, 2)),
    ("unet", "weak"): lambda: ShapesUNet(unet_config(32, 1)),
    ("mmdit", "main"): lambda: ShapesMMDiT(mmdit_config(2, 6)),
    ("mmdit", "weak"): lambda: ShapesMMDiT(mmdit_config(1, 4)),
}


def build(model: str, strength: str) -> comfy.model_base.BaseModel:
    """The host's model object with uninitialised weights."""
    network = _CONFIGS[model, strength]().get_model({}, device=torch.device("cpu"))
    network.eval()
    return network


def load_model(model: str, strength: str, disable_dynamic: bool = True) -> comfy.model_patcher.ModelPatcher:
    """One of the four embedded models, ready for the host's samplers.

    The host calls this again where it needs a second set of weights, with ``disable_dynamic`` as for its own loaders: never dynamic here.
    """
    network = build(model, strength)
    weights = comfy.utils.load_torch_file(str(WEIGHTS / f"{model}_{strength}.safetensors"))
    network.diffusion_model.load_state_dict({name: value.float() for name, value in weights.items()})
    patcher = comfy.model_patcher.ModelPatcher(
        network, load_device=comfy.model_management.get_torch_device(), offload_device=comfy.model_management.unet_offload_device()
    )
    patcher.cached_patcher_init = (load_model, (model, strength))
    return patcher


def load_clip() -> comfy.sd.CLIP:
    """The caption encoder as the host's CLIP object."""
    state = comfy.utils.load_torch_file(str(WEIGHTS / "words.safetensors"))
    return comfy.sd.CLIP(ClipTarget(CaptionTokenizer, CaptionEncoder), parameters=LENGTH * WIDTH, state_dict=state)


def load_vae() -> comfy.sd.VAE:
    """The host's pixel-space VAE: pictures are their own latents."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


def encode(clip: Any, texts: Sequence[str]) -> list:
    """The captions as one CONDITIONING with a row for each."""
    encoded = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in texts]
    context, pooled = (torch.cat(part) for part in zip(*encoded, strict=True))
    return [[context, {"pooled_output": pooled}]]
