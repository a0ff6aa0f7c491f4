"""APG: high scales without burned colours (Sadat et al. 2025, arXiv 2410.02416, tables 1 and 2)."""

from __future__ import annotations

from lodestar.demo.models import MODELS

from ..cells import guided, node
from ..claims import Claim, Results
from ..method import Curve, Method, cells_of, cfg, cfg_sweep
from ..metrics import ACCURACY, CONTRAST, FRECHET, RECALL, SATURATION

SCALES = (2.8, 4.0, 5.6, 8.0)
THRESHOLD = 1.0  # of the norm: these latents are a small fraction of SDXL's, for which the paper has 15
LOW_CONTRAST = (
    "the unet alone (CFG 1) has less contrast than the data. CFG's excess of it makes up for that at moderate scales. APG leaves the "
    "model's own contrast as it is at every scale, which is what it is for."
)
LATER = (
    "the threshold limits what the scale can add, so that APG follows captions at a given scale as CFG does at a lower one: its accuracy "
    "rises with the scale to that of CFG (see the picture), and does not fall at the end."
)
METRICS = (
    ("saturation stays near the data", SATURATION, 0.0, ""),
    ("contrast stays near the data", CONTRAST, 0.0, LOW_CONTRAST),
    ("better distribution", FRECHET, 0.0, ""),
    ("more of the data is covered", RECALL, 0.0, ""),
    ("captions are followed as well", ACCURACY, 0.02, LATER),
)


def sweep(model: str) -> Curve:
    """APG over the sampler's cfg."""
    return Curve("APG", model, tuple((w, guided(model, f"APG {w:g}", w, node("LodestarAPG", norm_threshold=THRESHOLD))) for w in SCALES))


def claims(results: Results) -> list[Claim]:
    """At about 2 and 4 times the best CFG scale, against CFG at the same scale."""
    rows = []
    for model in MODELS:
        plain, projected = dict(cfg_sweep(model).points), dict(sweep(model).points)
        best = results.best(list(plain.values()), FRECHET)["cfg"]
        for factor in (2, 4):
            scale = min(SCALES, key=lambda w: abs(w - factor * best))
            rows += [Claim(f"at {factor} times the best scale, {text}", projected[scale], plain[scale], *rest) for text, *rest in METRICS]
    return rows


METHOD = Method(
    title="APG (Adaptive Projected Guidance)",
    axis="cfg",
    claims=claims,
    curves=tuple(curve for model in MODELS for curve in (cfg_sweep(model), sweep(model))),
    strips=tuple(cell for model in MODELS for cell in (cfg(model, 1.4), cfg(model, 8.0), cells_of(sweep(model))[-1])),
)
