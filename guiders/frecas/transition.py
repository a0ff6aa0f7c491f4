"""From one stage of a cascade to the next: the clean estimate through pixel space to the next size, fresh noise, conditioning to scale.

Zhang, Li, Zhang, ICLR 2025, arXiv 2410.18410, section 3:  x = a_F encode(resize(clip(decode(D)))) + s_F eps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from torch import Tensor

from .levels import first_sigmas, next_sigmas
from .stages import NAME, Stage, check_size, gamma_of, ratio, size_multiple

RESIZES = ("nearest", "bilinear", "bicubic", "lanczos")
_TILE, _OVERLAP = 512, 64  # pixels
_STREAM = 0x9E3779B97F4A7C15  # odd, so that the streams of 2^64 stages differ


# --- pixels ----------------------------------------------------------------------------------------------------------


def decode(vae: Any, latent: Tensor) -> Tensor:
    """Latent [B, C, (T,) h, w] to pictures clipped to [0, 1]: [B, H, W, 3] or [B, T, H, W, 3]; in tiles when memory is short."""
    if _fits(vae, "memory_used_decode", latent.shape):
        pixels = vae.decode(latent)
    else:
        factor = vae.spacial_compression_decode()
        pixels = vae.decode_tiled(latent, tile_x=_TILE // factor, tile_y=_TILE // factor, overlap=_OVERLAP // factor)
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


def stage_seed(seed: int, stage: int) -> int:
    """The seed of a stage's noise (0 is the first, which has the seed itself)."""
    return (seed + stage * _STREAM) % 2**64


def stage_noise(latent: Tensor, seed: int, stage: int, batch_index: Any = None) -> Tensor:
    """The fresh noise of a stage, from its own stream."""
    return comfy.sample.prepare_noise(latent, stage_seed(seed, stage), batch_index)


def renoise(model: Any, latent: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x = a z + s eps, in the form in which the host's samplers take a noisy latent together with no noise of their own.

    latent, noise [B, C, ...]; sigma: a level as the host counts it. The host's own scaling is that path (see spaces.level_of).
    """
    sampling = model.get_model_object("model_sampling")
    if torch.count_nonzero(latent) > 0:  # as the host does
        latent = model.model.process_latent_in(latent)
    noisy = sampling.noise_scaling(sigma, noise, latent)
    return model.model.process_latent_out(sampling.inverse_noise_scaling(sigma, noisy))


# --- what a sampler needs for a stage --------------------------------------------------------------------------------


class StageStart(NamedTuple):
    """A stage before it is sampled: its latent [B, C, ...], its levels, its seed, and whether the sampler is to add that seed's noise."""

    latent: Tensor
    sigmas: Tensor
    seed: int
    add_noise: bool

    def noise(self, batch_index: Any = None) -> Tensor:
        """What the sampler adds [B, C, ...]: the seed's noise, or zeros for a latent that is noisy already."""
        if self.add_noise:
            return comfy.sample.prepare_noise(self.latent, self.seed, batch_index)
        return torch.zeros_like(self.latent, device="cpu")


def empty_latent(model: Any, vae: Any, stage: Stage, batch: int) -> Tensor:
    """Zeros of a stage's size as the model's latent: [batch, C, (1,) h, w]."""
    latent_format, pixels = model.get_model_object("latent_format"), vae.spacial_compression_encode()
    frames = [1] if latent_format.latent_dimensions == 3 else []
    return torch.zeros(batch, latent_format.latent_channels, *frames, stage.height // pixels, stage.width // pixels)


def first_start(latent: Tensor, sigmas: Tensor, seed: int) -> StageStart:
    """The first stage, from a clean latent."""
    return StageStart(latent, sigmas, stage_seed(seed, 0), add_noise=True)


def next_start(
    model: Any, vae: Any, stage: Stage, number: int, denoised: Tensor, sigmas: Tensor, seed: int, method: str,
    batch_index: Any = None, paste: Callable[[Tensor], Tensor] | None = None,
) -> StageStart:  # fmt: skip
    """Stage ``number``, from the clean estimate of the one before: enlarged by ``method`` (one of RESIZES), then noisy.

    paste: puts what an inpainting run knows into the clean latent; the host's inpainting wants that without noise.
    """
    clean = enlarge(vae, denoised, stage.width, stage.height, method)
    if paste is not None:
        return StageStart(paste(clean), sigmas, stage_seed(seed, number), add_noise=True)
    noisy = renoise(model, clean, sigmas[0], stage_noise(clean, seed, number, batch_index))
    return StageStart(noisy, sigmas, stage_seed(seed, number), add_noise=False)


# --- the steps of a cascade one by one, for graphs -------------------------------------------------------------------


def begin(model: Any, vae: Any, stage: Stage, scheduler: str, seed: int, batch: int) -> StageStart:
    """A first stage from nothing. Raises ValueError for a size or an end that cannot be."""
    check_size(stage.width, stage.height, size_multiple(model, vae.spacial_compression_encode()))
    return first_start(empty_latent(model, vae, stage, batch), first_sigmas(model, scheduler, stage), seed)


def advance(
    model: Any, vae: Any, stage: Stage, scheduler: str, seed: int, number: int, gamma: float, method: str,
    denoised: dict[str, Any] | None, sigmas: Tensor | None,
) -> StageStart:  # fmt: skip
    """Stage ``number`` after one whose ``denoised`` LATENT and levels are given. gamma: below 0 for the authors' with two stages.

    Raises ValueError for stage 0, and for a size, an end or a latent that cannot be.
    """
    if denoised is None or sigmas is None:
        raise ValueError("FreCaS Stage Transition: connect both denoised and sigmas, or neither for the first stage.")
    if number == 0:
        raise ValueError(
            "FreCaS Stage Transition: stage 0 is the first, which begins with nothing, and denoised is connected; set stage to 1 or more, "
            "or disconnect denoised and sigmas."
        )
    if "noise_mask" in denoised:
        raise ValueError(f"FreCaS Stage Transition cannot keep to a noise mask; use the {NAME} node for that.")
    pixels = vae.spacial_compression_encode()
    check_size(stage.width, stage.height, size_multiple(model, pixels))
    height, width = (side * pixels for side in denoised["samples"].shape[-2:])
    rho = ratio(Stage(width, height, 1), stage)
    levels = next_sigmas(model, scheduler, sigmas, rho, gamma_of(model, 2, gamma), stage)
    return next_start(model, vae, stage, number, denoised["samples"], levels, seed, method, denoised.get("batch_index"))


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
