"""From one stage of a cascade to the next: the clean estimate through pixel space to the next size, fresh noise, conditioning to scale.

Zhang, Li, Zhang, ICLR 2025, arXiv 2410.18410, section 3:  x = a_F encode(resize(clip(decode(D)))) + s_F eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from torch import Tensor

RESIZES = ("nearest", "bilinear", "bicubic", "lanczos")
_TILE, _OVERLAP = 512, 64  # pixels
_STREAM = 0x9E3779B97F4A7C15  # odd, so that the streams of 2^64 stages differ


def stage_seed(seed: int, stage: int) -> int:
    """The seed of a stage's noise (0 is the first, which has the seed itself)."""
    return (seed + stage * _STREAM) % 2**64


# --- pixels ----------------------------------------------------------------------------------------------------------


def decode(vae: Any, latent: Tensor) -> Tensor:
    """Latent [B, C, (T,) h, w] to pictures clipped to [0, 1]: [B, H, W, 3] or [B, T, H, W, 3]; in tiles when memory is short."""
    if _fits(vae, "memory_used_decode", latent.shape):
        pixels = vae.decode(latent)
    else:
        ratio = vae.spacial_compression_decode()
        pixels = vae.decode_tiled(latent, tile_x=_TILE // ratio, tile_y=_TILE // ratio, overlap=_OVERLAP // ratio)
    return pixels.clamp(0, 1)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """The inverse of ``decode``. The host's VAEs take one video at a time."""
    if pixels.ndim == 5:
        return torch.cat([encode(vae, video) for video in pixels])
    if _fits(vae, "memory_used_encode", pixels.movedim(-1, 1).shape):
        return vae.encode(pixels)
    return vae.encode_tiled(pixels, tile_x=_TILE, tile_y=_TILE, overlap=_OVERLAP)


def _fits(vae: Any, estimate: str, shape: Sequence[int]) -> bool:
    """Whether the host expects one picture to fit in memory after it has made room. It retries in tiles on its own if it errs."""
    if getattr(vae, "latent_dim", 2) != 2:  # the estimates for videos count what no tile would change
        return True
    needed = getattr(vae, estimate)(shape, vae.vae_dtype)
    comfy.model_management.load_models_gpu([vae.patcher], memory_required=needed)
    return vae.patcher.get_free_memory(vae.device) > needed


def resize(pixels: Tensor, width: int, height: int, method: str) -> Tensor:
    """Pictures [..., H, W, 3] to another size by the host's own resizer; a new aspect ratio stretches."""
    if tuple(pixels.shape[-3:-1]) == (height, width):
        return pixels
    frames = pixels.flatten(0, -4).movedim(-1, 1)
    large = comfy.utils.common_upscale(frames, width, height, method, "disabled").clamp(0, 1)
    return large.movedim(1, -1).reshape(*pixels.shape[:-3], height, width, pixels.shape[-1])


def enlarge(vae: Any, latent: Tensor, width: int, height: int, method: str) -> Tensor:
    """encode(resize(clip(decode(latent)))): a latent of another size, in pixels."""
    return encode(vae, resize(decode(vae, latent), width, height, method))


# --- noise -----------------------------------------------------------------------------------------------------------


def renoise(model: Any, latent: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x = a z + s eps, in the form in which the host's samplers take a noisy latent together with no noise of their own.

    latent, noise [B, C, ...]; sigma: a level as the host counts it.
    """
    sampling = model.get_model_object("model_sampling")
    if torch.count_nonzero(latent) > 0:  # as the host does
        latent = model.model.process_latent_in(latent)
    noisy = sampling.noise_scaling(sigma, noise, latent)
    return model.model.process_latent_out(sampling.inverse_noise_scaling(sigma, noisy))


def stage_noise(latent: Tensor, seed: int, stage: int, batch_index: Any = None) -> Tensor:
    """The fresh noise of a stage, from its own stream."""
    return comfy.sample.prepare_noise(latent, stage_seed(seed, stage), batch_index)


# --- conditioning ----------------------------------------------------------------------------------------------------

_HEIGHTS = ("height", "crop_h", "target_height")
_WIDTHS = ("width", "crop_w", "target_width")


def rescale_conditioning(conditioning: Sequence[Any], down: float, across: float) -> list[Any]:
    """CONDITIONING for a stage ``down`` times higher and ``across`` times wider than the first, for which it was made.

    Areas, GLIGEN boxes and the size conditioning are scaled. Masks, ControlNet hints, shares and latents to concatenate
    are left to the host, which fits them to the latent in every run.
    """
    return [[tensor, _rescaled(values, down, across)] for tensor, values in conditioning]


def _rescaled(values: dict[str, Any], down: float, across: float) -> dict[str, Any]:
    values = values.copy()
    for names, factor in ((_HEIGHTS, down), (_WIDTHS, across)):
        values.update({name: round(values[name] * factor) for name in names if name in values})
    area = values.get("area")
    if area is not None and area[0] != "percentage":
        factors = [*[1.0] * (len(area) // 2 - 2), down, across]
        values["area"] = tuple(round(side * factor) for side, factor in zip(area, factors * 2, strict=True))
    if values.get("gligen", ("",))[0] == "position":
        kind, network, boxes = values["gligen"]  # a box: embedding, height, width, y, x
        factors = (down, across, down, across)
        scaled = [(box[0], *(round(side * factor) for side, factor in zip(box[1:], factors, strict=True))) for box in boxes]
        values["gligen"] = (kind, network, scaled)
    return values
