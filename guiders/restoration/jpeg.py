"""JPEG as a function of tensors: what compressing and decompressing makes of a picture. ITU-T T.81, annexes A and K, with the quality
scale of libjpeg (Independent JPEG Group), chroma at half the resolution, and the interpolation of chroma that libjpeg calls fancy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100,
    103, 99,
)  # fmt: skip
_CHROMINANCE = (17, 18, 24, 47, 18, 21, 26, 66, 24, 26, 56, 99, 47, 66, 99, 99)  # the first four of the first four rows; 99 elsewhere
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_SIDE = 8  # of a block


def compressed(pictures: Tensor, quality: int) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] after JPEG of this quality (1 to 100), in [-1, 1]."""
    height, width = pictures.shape[-2:]
    bytes_ = ((pictures.clamp(-1, 1) + 1) * 127.5).round()
    even = F.pad(bytes_, (0, -width % (2 * _SIDE), 0, -height % (2 * _SIDE)), mode="replicate")
    to_ycc = torch.tensor(_TO_YCC, dtype=torch.float64).to(even)
    luma, chroma = torch.einsum("ij,bjhw->bihw", to_ycc, even).round().split([1, 2], dim=1)
    luma = _quantised(luma - 128, _table(_LUMINANCE, quality)) + 128
    bias = torch.tensor([0.25, 0.5]).to(even).repeat(even.shape[-1] // 4)  # libjpeg rounds halves down and up in turns
    halved = (F.avg_pool2d(chroma, 2) + bias).floor()
    chroma = _quantised(halved, _table(_chrominance(), quality))[..., : (height + 1) // 2, : (width + 1) // 2]
    planes = torch.cat([luma[..., :height, :width], F.interpolate(chroma, scale_factor=2, mode="bilinear")[..., :height, :width]], dim=1)
    rgb = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(to_ycc.double()).to(even), planes)
    return rgb.round().clamp(0, 255) / 127.5 - 1


def _quantised(planes: Tensor, table: Tensor) -> Tensor:
    """Planes [B, c, H, W] with the coefficients of their blocks rounded to multiples of the table [8, 8]."""
    cosines, table = _cosines().to(planes), table.to(planes)
    blocks = planes.unflatten(-1, (-1, _SIDE)).unflatten(-3, (-1, _SIDE)).transpose(-3, -2)  # [B, c, rows, columns, 8, 8]
    coefficients = (cosines @ blocks @ cosines.mT / table).round() * table
    return (cosines.mT @ coefficients @ cosines).round().transpose(-3, -2).flatten(-4, -3).flatten(-2)


def _cosines() -> Tensor:
    """The orthonormal DCT-II [8, 8]; frequencies are rows."""
    n = torch.arange(_SIDE, dtype=torch.float64)
    rows = torch.cos(math.pi / _SIDE * (n + 0.5) * n[:, None]) * math.sqrt(2 / _SIDE)
    return torch.cat([rows[:1] / math.sqrt(2), rows[1:]])


def _table(base: tuple[int, ...], quality: int) -> Tensor:
    """The steps [8, 8] of a quality, as libjpeg scales them."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return torch.tensor([min(max((step * percent + 50) // 100, 1), 255) for step in base]).reshape(_SIDE, _SIDE)


def _chrominance() -> tuple[int, ...]:
    rows = [[*_CHROMINANCE[4 * row : 4 * row + 4], *[99] * 4] if row < 4 else [99] * _SIDE for row in range(_SIDE)]
    return tuple(step for row in rows for step in row)
