"""Mixtures of Gaussians, whose denoisers are known in closed form, and a sampler for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Mixture:
    """Gaussians: means [K, 2], axes [K, 2, 2] (columns), variances [K, 2] along them, weights [K], branch [K] that each is part of."""

    means: Tensor
    axes: Tensor
    variances: Tensor
    weights: Tensor
    branch: Tensor

    def local(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """(log of weight_k N(x; k, sigma) [B, K], x - mean_k along the axes of component k [B, K, 2])."""
        away = torch.einsum("bi,kij->bkj", x, self.axes) - torch.einsum("ki,kij->kj", self.means, self.axes)
        noisy = self.variances + sigma**2
        return self.weights.log() - 0.5 * (away**2 / noisy + (2 * math.pi * noisy).log()).sum(-1), away

    def denoised(self, x: Tensor, sigma: float) -> Tensor:
        """E[x0 | x0 + sigma n = x]: [B, 2] -> [B, 2]."""
        log, away = self.local(x, sigma)
        posterior = log.softmax(-1)
        shift = away * (self.variances / (self.variances + sigma**2)) * posterior[..., None]
        return posterior @ self.means + torch.einsum("bkj,kij->bi", shift, self.axes)

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x): [B, 2] -> [B]."""
        return self.local(x, 0.0)[0].logsumexp(-1)

    def shares(self, x: Tensor) -> Tensor:
        """The share of the points in each branch: [B, 2] -> [branches]."""
        nearest = self.branch[self.local(x, 0.0)[0].argmax(-1)]
        return torch.bincount(nearest, minlength=int(self.branch.max()) + 1) / len(x)

    def draw(self, n: int, seed: int = 0, sigma: float = 0.0) -> Tensor:
        """n noisy points: [n, 2]."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(2, n, 2, dtype=self.means.dtype, generator=generator)
        away = torch.einsum("nij,nj->ni", self.axes[which], noise[0] * self.variances[which].sqrt())
        return self.means[which] + away + sigma * noise[1]

    def blurred(self, width: float) -> Mixture:
        """What a network learns that cannot resolve details below ``width``."""
        return replace(self, variances=self.variances + width**2)

    def __or__(self, other: Mixture) -> Mixture:
        """An even mix of both."""
        parts = [(m.means, m.axes, m.variances, m.weights / 2, m.branch) for m in (self, other)]
        return Mixture(*(torch.cat(part) for part in zip(*parts, strict=True)))


def fractal(angle: float, depth: int = 5, seed: int = 2) -> Mixture:
    """A tree that forks at every level: one class of the kind of toy that Karras et al. use (arXiv 2406.02507, section 3)."""
    random = np.random.RandomState(seed)
    rows: list[tuple] = []
    forks = 0

    def grow(level: int, start: np.ndarray, angle: float) -> None:
        nonlocal forks
        along = np.array([np.cos(angle), np.sin(angle)])
        length = 0.45 * 0.8**level * (1 + 0.2 * random.randn())
        for t in np.linspace(0.08, 0.92, 6):
            axes = np.stack([along, along[::-1] * (-1, 1)], axis=1)
            variances = ((length / 10) ** 2, (0.012 * 0.8**level) ** 2)
            rows.append((start + along * length * t, axes, variances, length * 0.5**level, forks))
        forks += 1
        if level + 1 < depth:
            for sign in (1, -1):
                grow(level + 1, start + along * length, angle + sign * 0.75 * 0.85**level * (1 + 0.2 * random.randn()))

    grow(0, np.zeros(2), angle)
    means, axes, variances, weights, branch = (torch.tensor(np.array(column)) for column in zip(*rows, strict=True))
    return Mixture(means, axes, variances, weights / weights.sum(), branch)


def ring(classes: int = 8, along: float = 0.12, across: float = 0.05) -> Mixture:
    """Blobs on the unit circle, longer along it than across; each is a branch."""
    angles = torch.arange(classes, dtype=torch.float64) * 2 * math.pi / classes
    outward, sideways = torch.stack([angles.cos(), angles.sin()], -1), torch.stack([-angles.sin(), angles.cos()], -1)
    variances = torch.tensor([across**2, along**2], dtype=torch.float64).expand(classes, 2)
    axes = torch.stack([outward, sideways], -1)
    return Mixture(outward, axes, variances, torch.full((classes,), 1 / classes, dtype=torch.float64), torch.arange(classes))


def only(mixture: Mixture, branch: int) -> Mixture:
    """One branch of a mixture."""
    keep = mixture.branch == branch
    parts = (mixture.means, mixture.axes, mixture.variances, mixture.weights / mixture.weights[keep].sum(), mixture.branch)
    return Mixture(*(part[keep] for part in parts))


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
