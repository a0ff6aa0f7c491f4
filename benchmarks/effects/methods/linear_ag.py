"""LinearAG: nearly the CFG picture for 25 of 40 evaluations (Castillo et al. 2025, arXiv 2312.12487, section 5)."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from lodestar.benchmarks._sampling import decoded, empty, ksampler, prompts
from lodestar.demo import models
from lodestar.demo.models import MODELS
from lodestar.demo.shapes import captions, random_scenes
from lodestar.guiders.learning.runs import Runs
from lodestar.guiders.policies.linear_ag.coefficients import Coefficients
from lodestar.guiders.policies.linear_ag.fit import fit
from lodestar.nodes.policies.linear_ag import LodestarLinearAG

from ..cells import Batch, Cell
from ..claims import Claim, Results
from ..method import Curve, Method, cfg
from ..metrics import ACCURACY, FRECHET, similarity_to
from .adaptive_guidance import SCALE, STEPS, WHY, adaptive, fewer_steps, step_ag

NFE = 25
TRAJECTORIES, TOGETHER, SEED = 100, 20, 1000
AG_THRESHOLD = 0.991  # about NFE evaluations with both models: see benchmarks/gamma.py


def linear(batch: Batch, *, model: str, cfg: float, steps: int) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] by KSampler with LinearAG, fitted on other captions and other noise."""
    fitted = coefficients(model=model, cfg=cfg, steps=steps)
    return with_model(batch, LodestarLinearAG.execute(batch.model(model), coefficients=fitted).result[0], model, cfg, steps)


def with_model(batch: Batch, patcher: Any, model: str, cfg: float, steps: int) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] by KSampler with a guided MODEL."""
    settings = {"steps": steps, "cfg": cfg, "scheduler": models.SCHEDULERS[model]}
    return decoded(ksampler(patcher, prompts(batch.captions), batch.latent, seed=batch.seed, **settings))


@cache
def coefficients(model: str, cfg: float, steps: int) -> Coefficients:
    """The fit, once for all batches."""
    return fit(runs_to_learn_from(model, cfg, steps, TRAJECTORIES // TOGETHER, TOGETHER), TRAJECTORIES)


def runs_to_learn_from(model: str, cfg: float, steps: int, number: int, together: int) -> Runs:
    """Runs of Euler on random captions, ``together`` at a time."""
    patcher, clip = models.load_model(model, "main"), models.load_clip()
    generator = torch.Generator().manual_seed(SEED)
    return Runs(
        name="effects",
        model=patcher,
        positive=[models.encode(clip, captions(random_scenes(together, generator, pairs=0.0))) for _ in range(number)],
        negative=models.encode(clip, [""]),
        latent={"samples": empty(together)},
        sampler=comfy.samplers.sampler_object("euler"),
        sigmas=comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), models.SCHEDULERS[model], steps),
        cfg=cfg,
        seed=SEED,
    )


def ours(model: str) -> Cell:
    """LinearAG."""
    return Cell("LinearAG", linear, (("model", model), ("cfg", SCALE), ("steps", STEPS)), coefficients)


def others(model: str) -> tuple[Cell, ...]:
    """The other ways to spend as much."""
    return adaptive(model, AG_THRESHOLD), step_ag(model, NFE), fewer_steps(model, NFE)


def claims(results: Results) -> list[Claim]:
    """LinearAG against the other ways to spend as much, and against CFG."""
    rows = []
    for model in MODELS:
        plain = cfg(model, SCALE)
        ssim = similarity_to(results.pictures(plain), f"{STEPS} steps of CFG")
        for other in others(model):
            nfe = " against ".join(f"{results.made(cell).nfe:.1f}" for cell in (ours(model), other))
            rows.append(Claim(f"closer to the CFG picture than {other.label} ({nfe} NFE)", ours(model), other, ssim, why=WHY))
        rows.append(Claim("captions are followed as well as by CFG", ours(model), plain, ACCURACY, 0.02))
    return rows


def cells(model: str) -> tuple[Cell, ...]:
    """What is compared, in the order of the axis."""
    return cfg(model, SCALE), ours(model), *others(model)


METHOD = Method(
    title="LinearAG: apply",
    axis="CFG, LinearAG, AG, Step AG, CFG in fewer steps",
    claims=claims,
    curves=tuple(Curve(f"{NFE} NFE", model, tuple(enumerate(cells(model)))) for model in MODELS),
    strips=tuple(cell for model in MODELS for cell in cells(model)),
    panels=(ACCURACY, FRECHET),
)
