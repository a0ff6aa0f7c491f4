"""FreCaS with windows of self-attention, and with Adaptive Guidance: our additions, against the cascade without them.

The demo models know 32x32. What is measured on 128x128 is measured after shrinking, except for objects and seams.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lodestar.benchmarks._sampling import decoded, prompts
from lodestar.demo import models
from lodestar.demo.models import MODELS, PATCH
from lodestar.demo.shapes import SIZE
from lodestar.guiders.engine.attach import attach
from lodestar.guiders.frecas.cascade import Cascade
from lodestar.guiders.frecas.windows import borders
from lodestar.guiders.policies.adaptive import AdaptiveGuidance

from ..cells import Batch, Cell
from ..claims import Claim, Results
from ..method import Curve, Method
from ..metrics import ACCURACY, FRECHET, Metric, OfRows, Pictures, Rows
from .frecas import CFG, END, GAMMA, HIGH, REPEATED, cell, native, to_native

STEPS = {128: (16, 6, 8)}  # a picture of 256 takes six times the work
THRESHOLD = 0.998  # of Adaptive Guidance
SMALL = 0.05  # a step between neighbours that counts in full; edges of objects count no more


def in_windows(batch: Batch, *, model: str, stages: str, adaptive: bool) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] of a cascade."""
    patcher = batch.model(model)
    patcher = attach(patcher, AdaptiveGuidance(threshold=THRESHOLD)) if adaptive else patcher
    whole = Cascade.read(
        stages, model=patcher, vae=models.load_vae(), cfg=CFG, sampler="euler", scheduler=models.SCHEDULERS[model], gamma=GAMMA[model],
        high_scale=HIGH, map_weight=0.6,
    )  # fmt: skip
    return decoded(whole.sample(*prompts(batch.captions), batch.seed, whole.latent(None, len(batch.scenes)))[-1]["samples"])


def stages(model: str, size: int, windows: bool) -> str:
    """From the trained size, doubling; with windows of that size."""
    parts = []
    for i, steps in enumerate(STEPS[size]):
        end = f", end {END[model]}" if i < len(STEPS[size]) - 1 else ""
        cut = f", windows {2**i}x{2**i}" if windows and i else ""
        parts.append(f"{SIZE * 2**i}x{SIZE * 2**i}: {steps} steps{end}{cut}")
    return "; ".join(parts)


def plain(model: str, size: int) -> Cell:
    """The cascade as it is."""
    return cell(model, f"FreCaS {size}", stages(model, size, False))


def divided(model: str, size: int, adaptive: bool = False) -> Cell:
    """The cascade with windows and, if asked, with Adaptive Guidance in all its stages."""
    settings = {"model": model, "stages": stages(model, size, True), "adaptive": adaptive}
    return Cell(f"windows {'and AG ' if adaptive else ''}{size}", in_windows, tuple(settings.items()))


def with_ag(model: str, size: int) -> Cell:
    """Both."""
    return divided(model, size, adaptive=True)


# --- measures --------------------------------------------------------------------------------------------------------


def steps_across(pictures: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """Mean small gradient of each picture [N], down and across: over the borders of its size's windows, and over other lines of patches."""
    side = pictures.pictures.shape[-1]
    cuts = {PATCH * cut for shifted in (False, True) for cut in borders(side // PATCH, side // SIZE, shifted)[1:-1]}

    def over(lines: list[int]) -> np.ndarray:
        pairs = [x[..., line] - x[..., line - 1] for x in (pictures.pictures, pictures.pictures.mT) for line in lines]
        return torch.stack(pairs).abs().clamp(max=SMALL).mean((0, 2, 3)).numpy()

    return over(sorted(cuts)), over([line for line in range(PATCH, side, PATCH) if line not in cuts])


def _seams(made: Pictures, _: object) -> OfRows:
    at, elsewhere = steps_across(made)

    def of(rows: Rows) -> float:
        return float(at[rows].mean() / elsewhere[rows].mean())

    return of


SEAMS = Metric("gradient across borders, of elsewhere", _seams, -1)


def claims(results: Results) -> list[Claim]:
    """No worse than the cascade without them."""
    rows = []
    for model in MODELS:
        near = to_native(results, model)
        for size in STEPS:
            for ours in (divided(model, size), with_ag(model, size)):
                wanted = ("no more repeated objects", REPEATED, 0.05), ("attributes as asked", ACCURACY, 0.05)
                wanted += ("looks like native pictures", near, 1.0), ("no seams", SEAMS, 0.05)
                rows += [
                    Claim(f"{size // SIZE} times the size: {text}", ours, plain(model, size), metric, margin)
                    for text, metric, margin in wanted
                ]
    return rows


WAYS = {"FreCaS": plain, "windows": divided, "windows and AG": with_ag}
METHOD = Method(
    title="FreCaS Cascade with windows",
    axis="side in pixels",
    claims=claims,
    curves=tuple(
        Curve(name, model, tuple((float(size), make(model, size)) for size in STEPS)) for model in MODELS for name, make in WAYS.items()
    ),
    strips=tuple(make(model, size) for model in MODELS for size in STEPS for make in WAYS.values()),
    others=tuple(native(model) for model in MODELS),
    panels=(FRECHET, ACCURACY, REPEATED, SEAMS),
    of_a_paper=False,
)
