"""APG: Adaptive Projected Guidance. Sadat, Hilliges, Weber, ICLR 2025, arXiv 2410.02416, Algorithm 1 (from ports of its listing)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.plan import Shaper
from ..engine.step import Step
from ..spaces import dot_per_sample, precise


def rescale(g: Tensor, r: float) -> Tensor:
    """g min(1, r / ||g||) per sample: [B, n] -> [B, n]."""
    norm = dot_per_sample(g, g).sqrt()
    return g * torch.where(norm > r, r / norm, 1.0)


def project(g: Tensor, denoised: Tensor) -> tuple[Tensor, Tensor]:
    """(g_par, g_perp) of g with respect to D_c, per sample, in float64: [B, n], [B, n]."""
    g, denoised = precise(g), precise(denoised)
    share = dot_per_sample(g, denoised) / dot_per_sample(denoised, denoised).clamp_min(1e-30)
    parallel = share * denoised
    return parallel, g - parallel


def projected_update(g: Tensor, denoised: Tensor, eta: float, r: float) -> Tensor:
    """g' = g_perp + eta g_par after the clamp to the ball of radius r (0 is no clamp): [B, n] -> [B, n] float64."""
    g = precise(g)
    if r > 0:
        g = rescale(g, r)
    parallel, orthogonal = project(g, denoised)
    return orthogonal + eta * parallel


@dataclass(frozen=True, kw_only=True)
class APG(Shaper):
    """Momentum, then rescale, then project; D = D_c + (w - 1) g'."""

    name: ClassVar[str] = "APG (Adaptive Projected Guidance)"
    short: ClassVar[str] = "APG"
    eta: float = 0.0
    norm_threshold: float = 15.0
    momentum: float = -0.5

    @property
    def neutral(self) -> bool:
        """eta 1, no clamp and no momentum is plain CFG."""
        return self.eta == 1 and self.norm_threshold <= 0 and self.momentum == 0

    def shape(self, update: Tensor, cond: Tensor, w: float, step: Step) -> Tensor:
        """g' for g = D_c - D_u."""
        g = self.with_momentum(update, step)
        pairs = zip(step.layout.split(g), step.layout.split(cond), strict=True)
        return step.layout.join([projected_update(part, d, self.eta, self.norm_threshold) for part, d in pairs], update)

    def with_momentum(self, g: Tensor, step: Step) -> Tensor:
        """g + beta m, where m is what the previous *step* left: further stages of a step start from the same m.

        A latent of another size, as after a sampler that upscales while it samples, begins without momentum.
        """
        if self.momentum == 0:
            return g
        memory = step.memory
        if step.first:
            memory["before"] = memory.get("after")
        before = memory.get("before")
        m = g if before is None or before.shape != g.shape else g + self.momentum * before
        if step.first:
            memory["after"] = m
        return m
