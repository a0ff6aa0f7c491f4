"""CFG++: better pictures than CFG at the same strength, and invertible (Chung et al. 2025, arXiv 2406.08070, tables 1 to 3)."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.sample
from torch import Tensor

from lodestar.benchmarks._sampling import decoded, prompts
from lodestar.benchmarks.inversion import AUTHORS_CFG, CFG, CFGPP, originals, psnr, schedule, there_and_back, worth
from lodestar.demo.models import MODELS
from lodestar.guiders.cfgpp.sampler import cfgpp_sampler

from ..cells import Batch, Cell
from ..claims import Claim, Results
from ..method import Curve, Method, cells_of, cfg, cfg_sweep
from ..metrics import ACCURACY, FRECHET, PRECISION, Metric, mean_of

SCALES = (1.4, 2.0, 2.8, 4.0, 5.6)  # of CFG; lambda is what is worth as much
STEPS, HIGH = 20, 5.6
INVERTED = (0.3, 0.6, 1.0)
SPREAD = (
    "at equal mean weight CFG++ is CFG with the weight spread otherwise over the steps (an identity that tests/cfgpp/test_solvers.py "
    "asserts, so the implementation is not the reason), and a picture of one object gains little from the spread: the differences are "
    "small beside what CFG's own scale does (Fréchet distance from {low:.1f} to {high:.1f})."
)
NEARLY_EXACT = (
    "scales are matched by mean weight, and in {steps} steps lambda 1 is worth only cfg {worth:.1f}, where inversion with CFG is good as "
    "well. The authors match lambda 1 with cfg {authors:g}: bench inversion compares with that, too."
)


def cfgpp_sampled(batch: Batch, *, model: str, lambda_: float) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] of the deterministic sampler, from the noise of the other cells."""
    patcher, latent, conds = batch.model(model), batch.latent, prompts(batch.captions)
    sampler, sigmas = cfgpp_sampler("euler", lambda_), schedule(model, STEPS)
    noise = comfy.sample.prepare_noise(latent, batch.seed)
    return decoded(comfy.sample.sample_custom(patcher, noise, 1.0, sampler, sigmas, *conds, latent, disable_pbar=True, seed=batch.seed))


def matched(model: str, scale: float) -> Cell:
    """CFG++ at the lambda that is worth this cfg."""
    lambda_ = round(scale / worth(model, STEPS), 2)
    return Cell(f"CFG++ {lambda_:g} (worth {scale:g})", cfgpp_sampled, (("model", model), ("lambda_", lambda_)))


def sweep(model: str) -> Curve:
    """CFG++ over the cfg that it is worth."""
    return Curve("CFG++", model, tuple((scale, matched(model, scale)) for scale in SCALES))


def inverted(model: str, method: str, lambda_: float) -> Cell:
    """Fresh pictures, inverted and sampled."""
    label = f"{method} inversion, lambda {lambda_:g}" + (f" (cfg {lambda_ * worth(model, STEPS):.1f})" if method == CFG else "")
    return Cell(label, there_and_back, (("model", model), ("method", method), ("lambda_", lambda_)))


def original(model: str) -> Cell:
    """What was inverted."""
    return Cell("originals", originals, (("model", model),))


def claims(results: Results) -> Sequence[Claim]:
    """At the best scale of CFG and at a high one; inversion at every scale."""
    rows = []
    for model in MODELS:
        distances = [results.measure(cfg(model, scale), FRECHET).value for scale in SCALES]
        spread = SPREAD.format(low=min(distances), high=max(distances))
        nearly_exact = NEARLY_EXACT.format(steps=STEPS, worth=worth(model, STEPS), authors=AUTHORS_CFG[1.0])
        best = results.best([cfg(model, scale) for scale in SCALES], FRECHET)["cfg"]
        for scale, where in ((best, "at the strength of the best CFG"), (HIGH, "at high strength")):
            pair = matched(model, scale), cfg(model, scale)
            rows += [
                Claim(f"{where}, better distribution", *pair, FRECHET, why=spread),
                Claim(f"{where}, captions are followed as well", *pair, ACCURACY, 0.02, spread),
            ]
        rows.append(Claim("at high strength, fewer pictures collapse", matched(model, HIGH), cfg(model, HIGH), PRECISION, why=spread))
        reference = results.pictures(original(model)).pictures
        fidelity = Metric("PSNR", lambda made, _, reference=reference: mean_of(psnr(made.pictures, reference).double().numpy()), 1)
        for lambda_ in INVERTED:
            pair = (inverted(model, method, lambda_) for method in (CFGPP, CFG))
            rows.append(Claim(f"inverted at lambda {lambda_:g}, closer to the picture", *pair, fidelity, why=nearly_exact))
    return rows


METHOD = Method(
    title="CFG++",
    axis="cfg, or what lambda is worth",
    claims=claims,
    curves=tuple(curve for model in MODELS for curve in (cfg_sweep(model, SCALES), sweep(model))),
    strips=tuple(cell for model in MODELS for cell in (cfg(model, HIGH), cells_of(sweep(model))[-1])),
    others=tuple(
        cell
        for model in MODELS
        for cell in (original(model), *(inverted(model, method, lambda_) for method in (CFGPP, CFG) for lambda_ in INVERTED))
    ),
    panels=(FRECHET, ACCURACY, PRECISION),
)
