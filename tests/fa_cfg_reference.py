"""FA-CFG as the paper writes it, with the resizes as matrices. Needs no host."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def taps(before: int, after: int) -> Tensor:
    """The matrix [after, before] of a bilinear resize of one axis: weights of the two nearest pixel centres, edges repeated."""
    matrix = torch.zeros(after, before, dtype=torch.float64)
    for i in range(after):
        centre = max((i + 0.5) * before / after - 0.5, 0.0)
        left = min(math.floor(centre), before - 1)
        right, share = min(left + 1, before - 1), centre - left
        matrix[i, left] += 1 - share
        matrix[i, right] += share
    return matrix


def fa_cfg(c: Tensor, u: Tensor, wl: float, wh: float, height: int, width: int) -> Tensor:
    """p_u + w_l Lp(p_c - p_u) + w_h Hp(p_c - p_u)."""
    vertical = taps(height, c.shape[-2]) @ taps(c.shape[-2], height)
    horizontal = taps(width, c.shape[-1]) @ taps(c.shape[-1], width)
    low = vertical @ (c - u) @ horizontal.T
    return u + wl * low + wh * (c - u - low)
