"""Adaptive Guidance: nearly the CFG picture for fewer evaluations (Castillo et al. 2025, arXiv 2312.12487, section 5)."""

from __future__ import annotations

from lodestar.demo.models import MODELS

from ..cells import Cell, guided, node
from ..claims import Claim, Results
from ..method import Curve, Method, cfg
from ..metrics import ACCURACY, FRECHET, similarity_to

SCALE, STEPS = 4.0, 20
THRESHOLD = 0.998  # at most NFE evaluations with both models: see bench gamma
NFE = 30  # of the two it is compared with

WHY = (
    "models this small end in nearly the same picture after somewhat fewer steps, so that dropping steps costs next to nothing. The fewer "
    "steps there are, the more each of them counts."
)


def adaptive(model: str, threshold: float = THRESHOLD) -> Cell:
    """AG."""
    return guided(model, f"AG {threshold:g}", SCALE, node("LodestarAdaptiveGuidance", threshold=threshold))


def fewer_steps(model: str, nfe: int = NFE) -> Cell:
    """CFG in all of fewer steps, with one evaluation more where ``nfe`` is odd."""
    steps = (nfe + 1) // 2
    return guided(model, f"CFG, {steps} steps", SCALE, steps=steps)


def step_ag(model: str, nfe: int = NFE) -> Cell:
    """CFG in the first steps alone, the same for every picture. Step i lies at a share of about i / (STEPS - 0.5) of both schedules."""
    first = nfe - STEPS
    interval = node("LodestarGuidanceInterval", end_percent=(first - 0.5) / (STEPS - 0.5))
    return guided(model, f"CFG in the first {first} steps", SCALE, interval)


def claims(results: Results) -> list[Claim]:
    """AG against the two ways that have at least as many evaluations, and against CFG."""
    rows = []
    for model in MODELS:
        plain, ours = cfg(model, SCALE), adaptive(model)
        ssim = similarity_to(results.pictures(plain), f"{STEPS} steps of CFG")
        nfe = " against ".join(f"{results.made(cell).nfe:.1f}" for cell in (ours, fewer_steps(model)))
        rows += [
            Claim(f"closer to the CFG picture than fewer steps of CFG ({nfe} NFE)", ours, fewer_steps(model), ssim, why=WHY),
            Claim(f"as close as CFG in the first steps, Step AG ({nfe} NFE)", ours, step_ag(model), ssim, 0.005),
            Claim("captions are followed as well as by CFG", ours, plain, ACCURACY, 0.02),
        ]
    return rows


def cells(model: str) -> tuple[Cell, ...]:
    """What is compared, in the order of the axis."""
    return cfg(model, SCALE), adaptive(model), step_ag(model), fewer_steps(model)


METHOD = Method(
    title="AG (Adaptive Guidance)",
    axis="CFG, AG, Step AG, CFG in fewer steps",
    claims=claims,
    curves=tuple(Curve(f"threshold {THRESHOLD:g}", model, tuple(enumerate(cells(model)))) for model in MODELS),
    strips=tuple(cell for model in MODELS for cell in cells(model)),
    panels=(ACCURACY, FRECHET),
)
