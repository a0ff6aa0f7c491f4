"""A measurement: what is left of a picture, and how it came about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import Inpaint, Operator


@dataclass(frozen=True, eq=False)
class Measurement:
    """y = A(x) + noise.

    y: [N, c, h, w], the operator A, height and width of the pictures x in [-1, 1], and the noise's standard deviation.
    """

    operator: Operator
    y: Tensor
    height: int
    width: int
    noise: float

    @classmethod
    def of_original(cls, pictures: Tensor, operator: Operator, noise: float, seed: int) -> Measurement:
        """Damage pictures [N, H, W, 3] in [0, 1]. Raises ValueError as ``Operator.check`` does."""
        x = _signed(pictures)
        operator.check(*x.shape[-2:])
        y = operator.apply(x)
        drawn = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)
        if isinstance(operator, Inpaint):  # what is hidden is not measured, noise included
            drawn = operator.apply(drawn)
        return cls(operator, y + noise * drawn, *x.shape[-2:], noise)

    @classmethod
    def of_damaged(cls, pictures: Tensor, operator: Operator, noise: float) -> Measurement:
        """Read damaged pictures [N, h, w, 3] in [0, 1]. Raises ValueError as ``Operator.check`` does."""
        y = _signed(pictures)
        height, width = operator.original(*y.shape[-2:])
        operator.check(height, width)
        return cls(operator, operator.read(y), height, width, noise)

    def picture(self) -> Tensor:
        """What the measurement looks like: [N, h, w, 3] in [0, 1]."""
        y = self.y.expand(-1, 3, -1, -1)
        return ((y + 1) / 2).clamp(0, 1).movedim(1, -1).contiguous()


def _signed(pictures: Tensor) -> Tensor:
    """An IMAGE [N, H, W, 3 or 4] in [0, 1] as [N, 3, H, W] in [-1, 1]."""
    return pictures[..., :3].movedim(-1, 1).float() * 2 - 1
