"""Autoguidance: quality without loss of variety (Karras et al. 2024, arXiv 2406.02507, table 1 and section 5)."""

from __future__ import annotations

from lodestar.demo.models import MODELS

from ..cells import WEAK, guided, node
from ..claims import Claim, Results
from ..method import Curve, Method, cells_of, cfg, cfg_sweep
from ..metrics import ACCURACY, DIVERSITY, FRECHET, PRECISION, RECALL

SCALES = (1.2, 1.4, 2.0)
WHY = (
    "the weak models are wrong in other ways than the main ones (colours, where the main models have all right), and autoguidance "
    "needs the same mistakes, only larger. With exact denoisers, where the weak model does make the same mistakes, the claim holds: "
    "bench toy, tests/benchmarks/test_toy.py."
)


def sweep(model: str) -> Curve:
    """Autoguidance without CFG over its own scale."""
    cells = ((w, guided(model, f"autoguidance {w:g}", 1.0, node("LodestarAutoguidance", weak_model=WEAK, scale=w))) for w in SCALES)
    return Curve("autoguidance", model, ((1.0, cfg(model, 1.0)), *cells))


def claims(results: Results) -> list[Claim]:
    """The best scale of each against the other."""
    rows = []
    for model in MODELS:
        best = results.best(cells_of(sweep(model))[1:], FRECHET)
        plain = results.best(cells_of(cfg_sweep(model)), FRECHET)
        rows += [
            Claim("better distribution than the best CFG", best, plain, FRECHET, why=WHY),
            Claim("no more loss of variety than the best CFG", best, plain, DIVERSITY, 0.02),
            Claim("better distribution than no guidance", best, cfg(model, 1.0), FRECHET, why=WHY),
        ]
    return rows


METHOD = Method(
    title="Autoguidance",
    axis="scale (autoguidance's, or cfg)",
    claims=claims,
    curves=tuple(curve for model in MODELS for curve in (cfg_sweep(model), sweep(model))),
    strips=tuple(cell for model in MODELS for cell in (cfg(model, 1.0), cfg(model, 1.4), cells_of(sweep(model))[2])),
    panels=(FRECHET, ACCURACY, PRECISION, RECALL, DIVERSITY),
)
