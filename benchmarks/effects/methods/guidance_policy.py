"""A searched policy: at least as close to CFG as AG is with as many evaluations (Castillo et al. 2025, arXiv 2312.12487, section 3)."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from lodestar.demo.models import MODELS
from lodestar.guiders.policies.search import search
from lodestar.guiders.policies.weights_per_step import StepWeights
from lodestar.nodes.policies.guidance_policy import LodestarGuidancePolicy

from ..cells import Batch, Cell
from ..claims import Claim, Results
from ..method import Curve, Method, cfg
from ..metrics import ACCURACY, FRECHET, similarity_to
from .adaptive_guidance import NFE, SCALE, STEPS, adaptive, step_ag
from .linear_ag import runs_to_learn_from, with_model

ITERATIONS, TOGETHER, COST_WEIGHT = 40, 2, 0.05


def searched(batch: Batch, *, model: str, cfg: float, steps: int) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] by KSampler with a policy that was searched on other captions and other noise."""
    found = policy(model=model, cfg=cfg, steps=steps)
    return with_model(batch, LodestarGuidancePolicy.execute(batch.model(model), found).result[0], model, cfg, steps)


@cache
def policy(model: str, cfg: float, steps: int) -> StepWeights:
    """The search, once for all batches."""
    return search(runs_to_learn_from(model, cfg, steps, ITERATIONS, TOGETHER), ITERATIONS, COST_WEIGHT)[0]


def ours(model: str) -> Cell:
    """The searched policy."""
    return Cell("searched policy", searched, (("model", model), ("cfg", SCALE), ("steps", STEPS)), policy)


def claims(results: Results) -> list[Claim]:
    """The policy against the rules with about as many evaluations."""
    rows = []
    for model in MODELS:
        plain = cfg(model, SCALE)
        ssim = similarity_to(results.pictures(plain), f"{STEPS} steps of CFG")
        for other in (adaptive(model), step_ag(model)):
            nfe = " against ".join(f"{results.made(cell).nfe:.1f}" for cell in (ours(model), other))
            rows.append(Claim(f"at least as close to the CFG picture as {other.label} ({nfe} NFE)", ours(model), other, ssim, 0.005))
        rows.append(Claim("captions are followed as well as by CFG", ours(model), plain, ACCURACY, 0.02))
    return rows


def cells(model: str) -> tuple[Cell, ...]:
    """What is compared, in the order of the axis."""
    return cfg(model, SCALE), ours(model), adaptive(model), step_ag(model)


METHOD = Method(
    title="Guidance policy: apply",
    axis="CFG, searched policy, AG, Step AG",
    claims=claims,
    curves=tuple(Curve(f"about {NFE} NFE", model, tuple(enumerate(cells(model)))) for model in MODELS),
    strips=tuple(cell for model in MODELS for cell in cells(model)),
    panels=(ACCURACY, FRECHET),
)
