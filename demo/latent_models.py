"""The 128-pixel demo models as the host's own objects: autoencoder, caption encoder, UNet (eps) and MMDiT (flow).

They are still in training: no node loads them yet. What they share with the 32-pixel models is in ``models`` and ``text``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.supported_models_base import ClipTarget

from . import autoencoder, models, scenes, text

WEIGHTS = Path(__file__).parent / "weights" / "latent"
STRENGTHS = ("main", "medium", "weak")
PATCH = 2
TOKENS = scenes.SIZE // autoencoder.SCALE // PATCH  # in a row of a picture
_PHRASES = scenes.MOST + 1  # of a caption: its objects and the background


class SceneTokenizer(text.CaptionTokenizer):
    """Words of captions with up to three objects."""

    vocabulary, length = scenes.WORDS, 24


class SceneEncoder(text.CaptionEncoder):
    """Ids -> cond [B, 24, 64] (word plus the phrase it is in) and pooled [B, 64] (sum of the words).

    An "a" begins a phrase, and "on" the last one. So the words of an object can be told from those of another, however many there are.
    """

    tokenizer = SceneTokenizer

    def __init__(self, dtype: torch.dtype | None = None, device: object = None, model_options: object = None) -> None:
        super().__init__(dtype, device, model_options)
        self.phrases = torch.nn.Embedding(_PHRASES + 1, text.WIDTH, padding_idx=0, device=device)
        self.requires_grad_(False)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, weights [B, 24] -> cond [B, 24, 64], pooled [B, 64]."""
        device = self.words.weight.device
        article, last = (self.tokenizer.vocabulary.index(word) + 1 for word in ("a", "on"))
        phrase = (ids == article).cumsum(dim=1).clamp(max=scenes.MOST)
        phrase = phrase.where((ids == last).cumsum(dim=1) == 0, _PHRASES) * (ids > 0)
        words = self.words(ids.to(device)).float() * weights[..., None].to(device)
        return words + self.phrases(phrase.to(device)).float(), words.sum(dim=1) / 3


def word_table() -> dict[str, torch.Tensor]:
    """Fixed, orthogonal vectors of the words and the phrases."""
    count = len(scenes.WORDS) + 1
    rows = text.word_table(range(count - 1 + _PHRASES))["words.weight"]
    return {"words.weight": rows[:count].clone(), "phrases.weight": torch.cat([rows[:1], rows[count:]])}


class SceneLatent(comfy.latent_formats.LatentFormat):
    """The autoencoder's latents, which have unit variance already."""

    latent_channels = autoencoder.CHANNELS
    spacial_downscale_ratio = autoencoder.SCALE


class LatentUNet(models.PatchedUNet):
    """The demo UNet on 2x2 patches of latents."""

    patch_size = PATCH


class _UNetBase(comfy.model_base.BaseModel):
    def __init__(self, config: Any, device: object = None) -> None:
        super().__init__(config, comfy.model_base.ModelType.EPS, device=device, unet_model=LatentUNet)

    def encode_adm(self, **kwargs: Any) -> torch.Tensor:
        return kwargs["pooled_output"]


class SceneUNet(models.ShapesUNet):
    """The UNet of the 32-pixel models with as many tokens, on latents; eps prediction."""

    native_size = scenes.SIZE
    latent_format = SceneLatent

    def get_model(self, state_dict: dict, prefix: str = "", device: object = None) -> comfy.model_base.BaseModel:
        return _UNetBase(self, device=device)


class SceneMMDiT(models.ShapesMMDiT):
    """SD3's joint transformer with as many tokens as the 32-pixel one, on latents; flow matching."""

    native_size = scenes.SIZE
    sampling_settings: ClassVar = {"shift": 1.0}
    latent_format = SceneLatent


def _unet_config(channels: int, depth: int) -> dict[str, Any]:
    size = autoencoder.CHANNELS * PATCH**2
    return models.unet_config(channels, depth) | {"image_size": TOKENS, "in_channels": size + 8, "out_channels": size}


def _mmdit_config(width: int, blocks: int) -> dict[str, Any]:
    return models.mmdit_config(width, blocks) | {"patch_size": PATCH, "in_channels": autoencoder.CHANNELS, "mlp_ratio": 2.0}


_CONFIGS = {
    ("unet", "main"): lambda: SceneUNet(_unet_config(64, 1)),
    ("unet", "weak"): lambda: SceneUNet(_unet_config(32, 1)),
    ("mmdit", "main"): lambda: SceneMMDiT(_mmdit_config(2, 6)),
    ("mmdit", "weak"): lambda: SceneMMDiT(_mmdit_config(1, 3)),
}


def build(model: str, strength: str) -> comfy.model_base.BaseModel:
    """The host's model object with uninitialised weights. ``medium`` is ``main`` at a quarter of its way."""
    network = _CONFIGS[model, "main" if strength == "medium" else strength]().get_model({}, device=torch.device("cpu"))
    network.eval()
    return network


def load_model(model: str, strength: str) -> comfy.model_patcher.ModelPatcher:
    """One of the embedded models, ready for the host's samplers. Raises FileNotFoundError for one that is not trained yet."""
    network = build(model, strength)
    weights = comfy.utils.load_torch_file(str(WEIGHTS / f"{model}_{strength}.safetensors"))
    network.diffusion_model.load_state_dict({name: value.float() for name, value in weights.items()})
    return comfy.model_patcher.ModelPatcher(
        network, load_device=comfy.model_management.get_torch_device(), offload_device=comfy.model_management.unet_offload_device()
    )


def load_clip() -> comfy.sd.CLIP:
    """The caption encoder as the host's CLIP object."""
    return comfy.sd.CLIP(ClipTarget(SceneTokenizer, SceneEncoder), parameters=SceneTokenizer.length * text.WIDTH, state_dict=word_table())


def load_autoencoder() -> autoencoder.Autoencoder:
    """The embedded autoencoder alone."""
    net = autoencoder.Autoencoder()
    weights = comfy.utils.load_torch_file(str(WEIGHTS / "autoencoder.safetensors"))
    net.load_state_dict({name: value.float() for name, value in weights.items()})
    return net.eval().requires_grad_(False)


def load_vae() -> comfy.sd.VAE:
    """The embedded autoencoder in the host's VAE class.

    The host knows first stages by their keys, and not this one; so it is given one that it knows, whose attributes are then replaced.
    """
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=torch.float32)
    vae.first_stage_model = load_autoencoder()
    vae.latent_channels = autoencoder.CHANNELS
    vae.downscale_ratio = vae.upscale_ratio = autoencoder.SCALE
    vae.memory_used_encode = lambda shape, dtype: 100 * shape[2] * shape[3] * comfy.model_management.dtype_size(dtype)
    vae.memory_used_decode = lambda shape, dtype: 8000 * shape[2] * shape[3] * comfy.model_management.dtype_size(dtype)
    offload = comfy.model_management.vae_offload_device()
    vae.patcher = comfy.model_patcher.ModelPatcher(vae.first_stage_model, load_device=vae.device, offload_device=offload)
    vae.size = None
    vae.model_size()
    return vae
