"""The ways to a large picture through the host's samplers and VAE, and what they take on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from lodestar.benchmarks._sampling import Conds, ksampler
from lodestar.guiders.frecas.cascade import Cascade
from lodestar.guiders.frecas.stages import Stage

CFG, PIXELS = 7.5, 8
DENOISE = 0.5  # of the second KSampler: half of the steps of the first


def timed_run(run: Callable[..., Tensor], model: Any, vae: Any, stages: Sequence[Stage], conds: Conds) -> tuple[float, int]:
    """Seconds and peak bytes of a recipe on a GPU, after one run of two steps to warm up."""
    short = [replace(stage, steps=min(stage.steps, 2)) for stage in stages]
    with torch.inference_mode():
        run(model, vae, short, conds)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        run(model, vae, stages, conds)
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated()


def run_direct(model: Any, vae: Any, stages: Sequence[Stage], conds: Conds) -> Tensor:
    """One KSampler, then a second one on the enlarged latent if there is a second size; the picture."""
    latent, denoise = _empty(model, stages[0]), 1.0
    for stage in stages:
        size = stage.width // PIXELS, stage.height // PIXELS
        latent = comfy.utils.common_upscale(latent, *size, "nearest-exact", "disabled")
        latent = ksampler(model, conds, latent, steps=stage.steps, cfg=CFG, scheduler="normal", seed=1, denoise=denoise)
        denoise = DENOISE
    return vae.decode(latent)


def run_frecas(model: Any, vae: Any, stages: Sequence[Stage], conds: Conds) -> Tensor:
    """The cascade; the picture."""
    cascade = Cascade(
        model=model, vae=vae, stages=stages, cfg=CFG, sampler="euler", scheduler="normal", gamma=-1.0, high_scale=35.0, map_weight=0.6
    )
    return vae.decode(cascade.sample(*conds, 1, cascade.latent(None, 1))[-1]["samples"])


def _empty(model: Any, stage: Stage) -> Tensor:
    channels = model.get_model_object("latent_format").latent_channels
    return torch.zeros(1, channels, stage.height // PIXELS, stage.width // PIXELS)
