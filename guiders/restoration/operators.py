"""Measurements y = A(x) + noise of pictures x in [-1, 1], and the transposes of A. Tasks and kernels: DPS, Chung et al. 2023,
arXiv 2209.14687, section 4 (box inpainting, super-resolution, Gaussian and motion blur); JPEG is in jpeg.py.

Everything here is float32 or float64, on any device, and has gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .jpeg import compressed

METHODS = ("bicubic", "area")  # of making pictures smaller
_LUMA = (0.299, 0.587, 0.114)  # Rec. 601, as JPEG and television have it


@dataclass(frozen=True, eq=False)
class Operator(ABC):
    """A way to damage pictures [B, 3, H, W]. ``apply`` and ``transpose`` are linear unless a class says otherwise."""

    @abstractmethod
    def apply(self, pictures: Tensor) -> Tensor:
        """A x: pictures [B, 3, H, W] to measurements [B, c, h, w]."""

    @abstractmethod
    def transpose(self, measured: Tensor) -> Tensor:
        """A^T y: measurements [B, c, h, w] to pictures [B, 3, H, W], so that <A x, y> = <x, A^T y>."""

    def linear(self, change: Tensor) -> Tensor:
        """What a small change [B, 3, H, W] of the picture changes in the measurement, as ``transpose`` has it."""
        return self.apply(change)

    def read(self, picture: Tensor) -> Tensor:
        """The measurement [B, c, h, w] that a picture [B, 3, h, w] of it shows."""
        return picture

    def original(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the pictures whose measurements have this height and width."""
        return height, width

    def check(self, height: int, width: int) -> None:  # noqa: B027, most sizes are fine
        """Raise ValueError, without the name of a node, for pictures x of a size that A cannot measure."""


@dataclass(frozen=True, eq=False)
class Inpaint(Operator):
    """A x = m x. known: m [1|B, 1, H, W], 1 where the picture is known, 0 elsewhere."""

    known: Tensor

    def apply(self, pictures: Tensor) -> Tensor:
        """The known part, grey elsewhere."""
        return pictures * self.known.to(pictures)

    def transpose(self, measured: Tensor) -> Tensor:
        """The same: m is its own transpose."""
        return self.apply(measured)

    def read(self, picture: Tensor) -> Tensor:
        """Whatever the picture shows elsewhere is left out."""
        return self.apply(picture)

    def check(self, height: int, width: int) -> None:
        """Sizes that differ, and masks that leave nothing."""
        if tuple(self.known.shape[-2:]) != (height, width):
            down, across = self.known.shape[-2:]
            raise ValueError(f"the mask has {across}x{down} pixels and the picture {width}x{height}; give it a mask of its own size.")
        if not self.known.flatten(1).any(dim=1).all():
            raise ValueError("the mask hides the whole picture, so that nothing is measured; leave a part of it black.")


@dataclass(frozen=True, eq=False)
class Downscale(Operator):
    """Fewer pixels by a whole factor: the mean of squares (area), or Keys' cubic (a = -1/2) stretched by the factor (bicubic)."""

    factor: int
    method: str = "bicubic"

    def apply(self, pictures: Tensor) -> Tensor:
        """Down W_h x W_w^T."""
        down, across = (self._weights(side, pictures) for side in pictures.shape[-2:])
        return down @ pictures @ across.mT

    def transpose(self, measured: Tensor) -> Tensor:
        """Up W_h^T y W_w."""
        down, across = (self._weights(side * self.factor, measured) for side in measured.shape[-2:])
        return down.mT @ measured @ across

    def _weights(self, side: int, like: Tensor) -> Tensor:
        return resizing(side, self.factor, self.method).to(like)

    def original(self, height: int, width: int) -> tuple[int, int]:
        """Larger by the factor."""
        return height * self.factor, width * self.factor

    def check(self, height: int, width: int) -> None:
        """Sizes that the factor does not divide."""
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"a picture of {width}x{height} pixels cannot be made {self.factor} times smaller; crop it to a multiple of that."
            )


def resizing(side: int, factor: int, method: str) -> Tensor:
    """The weights [side / factor, side] with which pixels of one axis make up fewer ones; each row has the sum 1."""
    small = torch.arange(side // factor, dtype=torch.float64)[:, None]
    distance = ((torch.arange(side, dtype=torch.float64) + 0.5) / factor - (small + 0.5)).abs()
    weights = (distance < 0.5).double() if method == "area" else _cubic(distance)
    return weights / weights.sum(dim=1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys 1981, with a = -1/2."""
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))


@dataclass(frozen=True, eq=False)
class Blur(Operator):
    """Correlation with a kernel [k, k] of odd size and sum 1, the same for each colour; pictures are mirrored at their edges."""

    kernel: Tensor

    def apply(self, pictures: Tensor) -> Tensor:
        """As DPS has it."""
        edge = len(self.kernel) // 2
        return F.conv2d(F.pad(pictures, (edge,) * 4, mode="reflect"), *self._depthwise(pictures), groups=pictures.shape[1])

    def transpose(self, measured: Tensor) -> Tensor:
        """The flipped kernel; what lies beyond the edges is folded back."""
        spread = F.conv_transpose2d(measured, *self._depthwise(measured), groups=measured.shape[1])
        return _folded(_folded(spread, len(self.kernel) // 2, -1), len(self.kernel) // 2, -2)

    def _depthwise(self, like: Tensor) -> tuple[Tensor]:
        return (self.kernel.to(like).expand(like.shape[1], 1, -1, -1),)

    def check(self, height: int, width: int) -> None:
        """Kernels that are larger than the picture, or have no middle."""
        size = len(self.kernel)
        if size % 2 == 0:
            raise ValueError(f"the kernel has {size} pixels on a side; it needs an odd number, so that it has a middle.")
        if size > min(height, width):
            raise ValueError(f"the kernel has {size} pixels on a side and the picture {width}x{height}; take a smaller kernel.")


def _folded(x: Tensor, edge: int, dim: int) -> Tensor:
    """The transpose of mirroring ``edge`` pixels at both ends of an axis."""
    side = x.shape[dim] - 2 * edge
    before, inner, after = x.split([edge, side, edge], dim)
    ends = [before.flip(dim), after.flip(dim)]
    margins = [(1, side - 1 - edge), (side - 1 - edge, 1)]  # pixels in front of and behind what is mirrored
    for end, (front, behind) in zip(ends, margins, strict=True):
        inner = inner + F.pad(end, (front, behind) if dim == -1 else (0, 0, front, behind))
    return inner


def gaussian_kernel(size: int, width: float) -> Tensor:
    """[size, size] of the standard deviation ``width`` in pixels."""
    x = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-0.5 * (x / width) ** 2)
    return _normal(line[:, None] * line)


def motion_kernel(size: int, angle: float) -> Tensor:
    """[size, size] of a movement along a line through the middle, ``angle`` degrees from the horizontal, counter-clockwise."""
    y, x = torch.meshgrid(*[torch.arange(size, dtype=torch.float64) - (size - 1) / 2] * 2, indexing="ij")
    across, down = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
    off_line = (x * down - y * across).abs()
    along = (x * across + y * down).abs()
    return _normal((1 - off_line).clamp_min(0) * (along <= size / 2))


def drawn_kernel(picture: Tensor) -> Tensor:
    """[k, k] of a picture [k, k, 3] in [0, 1] of the path. Raises ValueError, without the name of a node, for one without a path."""
    if picture.shape[0] != picture.shape[1]:
        raise ValueError(f"the kernel is {picture.shape[1]}x{picture.shape[0]} pixels; it has to be square.")
    if not picture.any():
        raise ValueError("the kernel is black all over; draw the path of the movement in white.")
    return _normal(picture.double().mean(dim=-1))


def _normal(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum()


@dataclass(frozen=True, eq=False)
class JPEG(Operator):
    """Compression. Not linear: gradients and the transpose take it for the identity (straight-through)."""

    quality: int

    def apply(self, pictures: Tensor) -> Tensor:
        """Compressed and decompressed."""
        return pictures + (compressed(pictures.detach(), self.quality) - pictures).detach()

    def transpose(self, measured: Tensor) -> Tensor:
        """Straight through."""
        return measured

    def linear(self, change: Tensor) -> Tensor:
        """Straight through."""
        return change


@dataclass(frozen=True, eq=False)
class Grey(Operator):
    """Brightness alone, in one channel."""

    def apply(self, pictures: Tensor) -> Tensor:
        """The weighted mean of the colours."""
        return (pictures * self._weights(pictures)).sum(dim=1, keepdim=True)

    def transpose(self, measured: Tensor) -> Tensor:
        """The same weights in the other direction."""
        return measured * self._weights(measured)

    def read(self, picture: Tensor) -> Tensor:
        """A grey picture has three equal channels."""
        return self.apply(picture)

    def _weights(self, like: Tensor) -> Tensor:
        return torch.tensor(_LUMA, dtype=torch.float64).to(like)[:, None, None]
