"""Guidance interval: better distribution than CFG throughout (Kynkäänniemi et al. 2024, arXiv 2404.07724, tables 1 and 2)."""

from __future__ import annotations

from lodestar.demo.models import MODELS

from ..cells import guided, node
from ..claims import Claim, Results
from ..method import Curve, Method, cells_of, cfg, cfg_sweep
from ..metrics import FRECHET, RECALL

SCALES = (2.0, 2.8, 4.0, 5.6)
WINDOWS = ((0.2, 0.8), (0.4, 1.0))  # shares of the schedule
WHY = (
    "the model's best CFG scale is low ({cfg:g}) and costs little variety, so that there is little for an interval to give back. "
    "The next row is about equal scales."
)


def sweep(model: str, start: float, end: float) -> Curve:
    """CFG in a window over the sampler's cfg."""
    window = node("LodestarGuidanceInterval", start_percent=start, end_percent=end)
    cells = ((w, guided(model, f"CFG {w:g} in {start:g} to {end:g}", w, window)) for w in SCALES)
    return Curve(f"CFG in {start:g} to {end:g}", model, ((1.0, cfg(model, 1.0)), *cells))


def claims(results: Results) -> list[Claim]:
    """The best window and scale against the best scale of CFG throughout."""
    rows = []
    for model in MODELS:
        best = results.best([cell for window in WINDOWS for cell in cells_of(sweep(model, *window))[1:]], FRECHET)
        plain = results.best(cells_of(cfg_sweep(model)), FRECHET)
        rows += [
            Claim("better distribution at the best scale of each", best, plain, FRECHET, why=WHY.format(cfg=plain["cfg"])),
            Claim("more of the data is covered at the same scale", best, cfg(model, best["cfg"]), RECALL),
        ]
    return rows


METHOD = Method(
    title="Guidance Interval",
    axis="cfg",
    claims=claims,
    curves=tuple(curve for model in MODELS for curve in (cfg_sweep(model), *(sweep(model, *window) for window in WINDOWS))),
    strips=tuple(cell for model in MODELS for cell in (cfg(model, 4.0), cells_of(sweep(model, *WINDOWS[0]))[3])),
)
