"""PSLD: posterior sampling with latent diffusion. Rout et al., NeurIPS 2023, arXiv 2307.00619, algorithm 2; PAG's authors restore with it
(Ahn et al., ECCV 2024, arXiv 2403.17377). In pixel space, without the gluing term, it is DPS (arXiv 2209.14687, algorithm 1).

    L  = omega || A f(z0) - y || + gamma || g(A^T y + f(z0) - A^T A f(z0)) - z0 ||        f decodes, g encodes, z0 = D_c(z_t)
    z' = z' - grad_{z_t} L

after the DDIM step to z'. Norms are taken for each sample, where the authors' code takes them over the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..spaces import Level, dot_per_sample
from .operators import Operator

AUTHORS_STEPS = 1000  # with fewer steps each goes further


def loss(
    estimate: Tensor, decode: Callable[[Tensor], Tensor], encode: Callable[[Tensor], Tensor], operator: Operator, y: Tensor,
    omega: float, gamma: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """L [B] of clean estimates z0 [B, ...], and the residual [B, c, h, w]. Without gamma nothing is encoded."""
    picture = decode(estimate)
    measured = operator.apply(picture)
    residual = measured - y
    value = omega * _norm(residual)
    if gamma != 0:
        glued = operator.transpose(y.expand_as(measured)) + picture - operator.transpose(measured)
        value = value + gamma * _norm(encode(glued) - estimate)
    return value, residual.detach()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def update(gradient: Tensor, value: Tensor, now: Level, then: Level, steps: int, own_noise: bool) -> Tensor:
    """What, added to the denoised prediction [B, ...], makes a DDIM step from ``now`` to ``then`` end at z' - c grad L.

    gradient: of L with respect to the host's x. value: L [B]. own_noise: whether the step carries the noise of the guided prediction on;
    that of CFG++ does not. The authors' z has unit variance, z = x / r with r^2 = a^2 + s^2, so that x' moves by r r' grad_x L. c is their
    1000 steps / ours, and no more than what takes the linearised loss to zero.
    """
    reach = then.a - (then.s * now.a / now.s if own_noise else 0.0)  # d x' / d D
    if reach <= 0:  # the step leads nowhere, or back to more noise
        return torch.zeros_like(gradient)
    flat = gradient.flatten(1)
    scale = _radius(now) * _radius(then) * AUTHORS_STEPS / steps
    most = value.reshape(-1, 1) / dot_per_sample(flat, flat).clamp_min(1e-30)
    length = most.clamp(max=scale).to(gradient)
    return -(length * flat).reshape(gradient.shape) / reach


def _radius(level: Level) -> float:
    return (level.a**2 + level.s**2) ** 0.5
