"""Small cascades: models of pictures that are their own latents, and stages that suit them.

Importing this loads the host.
"""

from __future__ import annotations

import torch
from tools import cond, tiny
from torch import Tensor

from lodestar.demo.models import ShapesLatent, load_vae
from lodestar.guiders.frecas.cascade import Cascade

KINDS = ["unet", "unet_v", "mmdit"]
ENDS = {"unet": 0.9, "unet_v": 0.9, "mmdit": 0.4}


def pixels(kind: str, seed: int = 0, **changes):
    """A tiny model of pictures that are their own latents, for the host's pixel-space VAE; ``changes`` go into its configuration."""
    model = tiny(kind, seed, in_channels=3, **({} if kind == "mmdit" else {"out_channels": 3}), **changes)
    model.model.latent_format = ShapesLatent()
    return model


def text(kind: str, sizes=("16x16", "32x32"), steps=(4, 3)) -> str:
    """Stages that suit a tiny model."""
    ends = [f", end {ENDS[kind]}"] * (len(sizes) - 1) + [""]
    return "; ".join(f"{size}: {n} steps{end}" for size, n, end in zip(sizes, steps, ends, strict=True))


def cascade(model, stages: str, **changes) -> Cascade:
    """A cascade with settings that keep random networks finite."""
    settings = {"cfg": 4.0, "sampler": "euler", "scheduler": "normal", "gamma": 1.5, "high_scale": 9.0, "map_weight": 0.0}
    return Cascade.read(stages, model=model, vae=changes.pop("vae", None) or load_vae(), **settings | changes)


def sample(model, stages: str, positive=None, negative=None, seed=1, latent=None, batch=1, **changes) -> list[Tensor]:
    """The clean latents of all stages."""
    whole = cascade(model, stages, **changes)
    with torch.inference_mode():
        results = whole.sample(positive or cond(1), negative or cond(2), seed, whole.latent(latent, batch))
    return [result["samples"] for result in results]
