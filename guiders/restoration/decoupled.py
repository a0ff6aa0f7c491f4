"""Restoration without a gradient through the denoiser: the clean estimate is moved to where it agrees with the measurement.

The proximal step of plug-and-play methods, as in DiffPIR (Zhu et al. 2023, arXiv 2305.08995, algorithm 1) and ReSample (Song et al. 2024,
arXiv 2307.08123, hard data consistency), with the variance of x0 given x_t of PiGDM (Song et al., ICLR 2023):

    minimise  || A f(z) - y ||^2 + rho || z - D ||^2,     rho = (sigma_y^2 + eps) / (strength r_t^2),     r_t^2 = s^2 / (a^2 + s^2)

where f decodes, D is the guided estimate, and x_t = a x0 + s noise. For f the identity and a Gaussian prior of unit variance the minimum is
the posterior mean given x_t and y. rho is largest at the end, where D is known best.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..spaces import dot_per_sample, level_of
from .operators import Operator

FLOOR = 1e-4  # eps: the least variance of the noise, in pictures from -1 to 1: half a step of 8 bits, and what a decoder cannot show
_PROBE = 0.1  # per latent pixel, whose values have about unit variance: how far apart the decoder is looked at to see where it goes

Decode = Callable[[Tensor], Tensor]


class Linearised(NamedTuple):
    """At a point z: the residual A f(z) - y, and J^T A^T of it, where J is the derivative of f."""

    picture: Tensor
    residual: Tensor
    gradient: Tensor


def precision(noise: float, strength: float, sigma: Tensor, flow: bool) -> Tensor:
    """rho [B] at the host's levels sigma [B]."""
    a, s = level_of(sigma, flow)
    return (noise**2 + FLOOR) / strength * (a * a + s * s) / (s * s)


def solve(decode: Decode, operator: Operator, y: Tensor, start: Tensor, rho: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """z [B, ...] after some iterations of conjugate gradients (Fletcher and Reeves 1964), and the residual [B, c, h, w] at the start.

    decode: differentiable, a row at a time. y: [1|B, c, h, w]. rho: [B]. Gradients have to be on. Each iteration takes two decodes and
    one backward pass. Where decode and A are linear this is the method for linear equations, with the exact minimum in the end.
    """
    z, rho = start, rho.reshape(-1, 1)
    direction = before = first = None
    for _ in range(iterations):
        here = linearised(decode, operator, y, z)
        first = here.residual if first is None else first
        gradient = here.gradient.flatten(1) + rho * (z - start).flatten(1)
        square = dot_per_sample(gradient, gradient)
        direction = -gradient if direction is None else (square / before.clamp_min(1e-30)).to(z) * direction - gradient
        before = square
        seen = _along(decode, operator, here, z, direction).flatten(1)
        slope = -dot_per_sample(gradient, direction)
        curvature = dot_per_sample(seen, seen) + rho * dot_per_sample(direction, direction)
        length = (slope / curvature.clamp_min(1e-30)).to(z)
        z = z + (length * direction).reshape(z.shape)
    return z, first


def linearised(decode: Decode, operator: Operator, y: Tensor, z: Tensor) -> Linearised:
    """One decode and one backward pass, of a row at a time: so the memory does not grow with the batch."""
    rows = zip(z.detach().split(1), y.expand(len(z), -1, -1, -1).split(1), strict=True)
    return Linearised(*map(torch.cat, zip(*(_linearised_row(decode, operator, *row) for row in rows), strict=True)))


def _linearised_row(decode: Decode, operator: Operator, z: Tensor, y: Tensor) -> Linearised:
    z = z.clone().requires_grad_()
    picture = decode(z)
    with torch.no_grad():
        residual = operator.apply(picture) - y
        back = operator.transpose(residual)
    (gradient,) = torch.autograd.grad(picture, z, back)
    return Linearised(picture.detach(), residual, gradient)


@torch.no_grad()
def _along(decode: Decode, operator: Operator, here: Linearised, z: Tensor, direction: Tensor) -> Tensor:
    """A J p for the direction p [B, n], by a difference; exact where decode is linear."""
    size = dot_per_sample(direction, direction).sqrt() / direction.shape[1] ** 0.5
    probe = (_PROBE / size.clamp_min(1e-30)).to(z)
    there = (z + (probe * direction).reshape(z.shape)).split(1)
    change = torch.cat([decode(row) for row in there]) - here.picture
    return operator.linear(change) / probe.reshape(-1, 1, 1, 1)
