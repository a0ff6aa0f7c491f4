"""What a workflow's Empty Latent Image, CLIP Text Encode, KSampler and VAE Decode do, for the demo models and for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.sample
import torch
from torch import Tensor

from lodestar.demo import models
from lodestar.demo.shapes import SIZE

Conds = tuple[list, list]  # positive and negative CONDITIONING


def empty(count: int) -> Tensor:
    """A latent of the demo models, [count, 3, H, W]."""
    return torch.zeros(count, 3, SIZE, SIZE)


def conditioning(text: str) -> list:
    """A CONDITIONING for the demo models."""
    clip = models.load_clip()
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def prompts(texts: Sequence[str]) -> Conds:
    """A caption for each row, and no words as the negative prompt."""
    clip = models.load_clip()
    return models.encode(clip, texts), models.encode(clip, [""])


def ksampler(
    model: Any,
    conds: Conds,
    latent: Tensor,
    *,
    steps: int,
    cfg: float,
    scheduler: str,
    seed: int,
    sampler: str = "euler",
    denoise: float = 1.0,
) -> Tensor:
    """The latent [B, C, H, W] that KSampler makes of one, with the host's noise of ``seed``."""
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, *conds, latent, denoise=denoise, disable_pbar=True, seed=seed)


def decoded(latent: Tensor) -> Tensor:
    """The demo VAE's pictures [B, 3, H, W] in [0, 1]."""
    return models.load_vae().decode(latent).movedim(-1, 1).float().cpu()
