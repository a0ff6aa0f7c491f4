"""Guidance on two-dimensional distributions whose denoisers are known in closed form: the pictures of the help pages.

    python run.py python benchmarks/toy.py

Every guided step goes through the pack's own functions. tests/test_toy.py asserts what the pictures show.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lodestar.guiders.apg import projected_update
from lodestar.guiders.attention import IdentityAttention
from lodestar.guiders.autoguidance import autoguidance_update
from lodestar.guiders.pag import PAG
from lodestar.guiders.run import Step
from lodestar.guiders.spaces import Layout

Denoiser = Callable[[Tensor, float], Tensor]


# --- distributions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """sum_k weights_k N(means_k, covs_k): means [K, 2], covs [K, 2, 2], weights [K], group [K] (the branch a component belongs to)."""

    means: Tensor
    covs: Tensor
    weights: Tensor
    group: Tensor

    def _posterior(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """(log of weights_k N(x; means_k, covs_k + sigma^2) [B, K], covs_k (covs_k + sigma^2)^-1 (x - means_k) [B, K, 2])."""
        noisy = self.covs + sigma**2 * torch.eye(2, dtype=x.dtype)
        away = x[:, None] - self.means
        solved = torch.einsum("kij,bkj->bki", torch.linalg.inv(noisy), away)
        log = self.weights.log() - 0.5 * torch.logdet(noisy) - math.log(2 * math.pi) - 0.5 * (away * solved).sum(-1)
        return log, torch.einsum("kij,bkj->bki", self.covs, solved)

    def denoised(self, x: Tensor, sigma: float) -> Tensor:
        """E[x0 | x0 + sigma n = x]: [B, 2] -> [B, 2]."""
        log, shift = self._posterior(x, sigma)
        return (log.softmax(-1)[..., None] * (self.means + shift)).sum(1)

    def log_density(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """log p(x; sigma): [B, 2] -> [B]."""
        return self._posterior(x, sigma)[0].logsumexp(-1)

    def branches(self, x: Tensor) -> Tensor:
        """The most probable group of each point: [B, 2] -> [B]."""
        return self.group[self._posterior(x, 0.0)[0].argmax(-1)]

    def draw(self, n: int, seed: int = 0, sigma: float = 0.0) -> Tensor:
        """n points of p(x; sigma): [n, 2]."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(2, n, 2, dtype=self.means.dtype, generator=generator)
        scaled = torch.einsum("nij,nj->ni", torch.linalg.cholesky(self.covs)[which], noise[0])
        return self.means[which] + scaled + sigma * noise[1]

    def blurred(self, width: float) -> Mixture:
        """What a network learns that cannot resolve details below ``width``."""
        return replace(self, covs=self.covs + width**2 * torch.eye(2, dtype=self.covs.dtype))

    def __or__(self, other: Mixture) -> Mixture:
        """An even mix of both."""
        parts = zip(*((m.means, m.covs, m.weights / 2, m.group + offset) for m, offset in ((self, 0), (other, 1000))), strict=True)
        return Mixture(*(torch.cat(part) for part in parts))


def fractal(angle: float, depth: int = 5, seed: int = 2) -> Mixture:
    """A tree that forks at every level, after the toy of Karras et al., arXiv 2406.02507, section 3; one class of it."""
    random = np.random.RandomState(seed)
    means, covs, weights, group = [], [], [], []

    def grow(level: int, start: np.ndarray, angle: float) -> None:
        if level == depth:
            return
        along = np.array([np.cos(angle), np.sin(angle)])
        length = 0.45 * 0.8**level * (1 + 0.2 * random.randn())
        thickness = 0.012 * 0.8**level
        for t in np.linspace(0.08, 0.92, 6):
            means.append(start + along * length * t)
            outer = np.outer(along, along)
            covs.append(outer * (length / 10) ** 2 + (np.eye(2) - outer) * thickness**2)
            weights.append(length * 0.5**level)
            group.append(2**level - 1 + branches[level])
        branches[level] += 1
        for sign in (1, -1):
            grow(level + 1, start + along * length, angle + sign * 0.75 * 0.85**level * (1 + 0.2 * random.randn()))

    branches = [0] * depth
    grow(0, np.zeros(2), angle)
    total = sum(weights)
    tensor = lambda rows: torch.tensor(np.array(rows), dtype=torch.float64)  # noqa: E731
    return Mixture(tensor(means), tensor(covs), tensor(weights) / total, torch.tensor(group))


def ring(classes: int = 8, wide: float = 0.12, flat: float = 0.05) -> Mixture:
    """Blobs on the unit circle, longer along it than across; one group each."""
    angles = torch.arange(classes, dtype=torch.float64) * 2 * math.pi / classes
    out = torch.stack([angles.cos(), angles.sin()], -1)
    along = torch.stack([-angles.sin(), angles.cos()], -1)
    covs = torch.einsum("ki,kj->kij", out, out) * flat**2 + torch.einsum("ki,kj->kij", along, along) * wide**2
    return Mixture(out, covs, torch.full((classes,), 1 / classes, dtype=torch.float64), torch.arange(classes))


# --- sampling --------------------------------------------------------------------------------------------------------


def edm_sigmas(steps: int, low: float = 0.002, high: float = 5.0, rho: float = 7.0) -> list[float]:
    """The schedule of Karras et al., arXiv 2206.00364, eq. 5, with the final 0."""
    return [(high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)] + [0.0]


def heun(denoise: Denoiser, x: Tensor, sigmas: list[float]) -> Tensor:
    """Karras et al., arXiv 2206.00364, Algorithm 1 without noise."""
    for sigma, following in pairwise(sigmas):
        d = (x - denoise(x, sigma)) / sigma
        predicted = x + (following - sigma) * d
        if following > 0:
            d = (d + (predicted - denoise(predicted, following)) / following) / 2
        x = x + (following - sigma) * d
    return x
