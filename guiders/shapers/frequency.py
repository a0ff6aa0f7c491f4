"""FA-CFG: frequency-aware CFG. Zhang, Li, Zhang, "FreCaS", ICLR 2025, arXiv 2410.18410, section 3 (read in the authors' facfg_wrapper.py).

D = D_u + w_l Lp(D_c - D_u) + w_h Hp(D_c - D_u)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..engine.plan import Shaper
from ..engine.start import Start
from ..engine.step import Step


def low_pass(y: Tensor, height: int, width: int) -> Tensor:
    """Lp(y) = up(down(y)) of [B, C, H, W] or, frame by frame, [B, C, T, H, W]: bilinear to height x width and back, no antialias."""
    frames = y if y.ndim == 4 else y.movedim(2, 1).flatten(0, 1)
    if (height, width) != tuple(y.shape[-2:]):
        down = F.interpolate(frames, size=(height, width), mode="bilinear", align_corners=False)
        frames = F.interpolate(down, size=y.shape[-2:], mode="bilinear", align_corners=False)
    return frames if y.ndim == 4 else frames.unflatten(0, (y.shape[0], -1)).movedim(1, 2)


def banded(g: Tensor, low: float, high: float, height: int, width: int) -> Tensor:
    """low Lp(g) + high Hp(g), with Hp(g) = g - Lp(g), for a low band of height x width; g itself where that is g."""
    if low == high or (height, width) == tuple(g.shape[-2:]):  # in the second case Hp(g) = 0
        return g if low == 1 else low * g
    lp = low_pass(g, height, width)
    return low * lp + high * (g - lp)


@dataclass(frozen=True, kw_only=True)
class FrequencyGuidance(Shaper):
    """w_l = ``low_scale`` and w_h = ``high_scale`` in place of the sampler's cfg w.

    D = D_c + (w_l - 1) Lp(g) + (w_h - 1) Hp(g) for g = D_c - D_u is the engine's D_c + (w - 1) shape(g) with
    shape(g) = (w_l - 1)/(w - 1) Lp(g) + (w_h - 1)/(w - 1) Hp(g): the weights do not depend on w, and w_l = w_h = w is CFG.

    low_height, low_width: size of the low band in latent pixels, the previous stage's latent.
    """

    name: ClassVar[str] = "FA-CFG (Frequency-aware CFG)"
    short: ClassVar[str] = "FA-CFG"
    low_scale: float = 7.5
    high_scale: float = 35.0
    low_height: int
    low_width: int

    @property
    def neutral(self) -> bool:
        """Never: whether the scales are the sampler's cfg is known in the run only."""
        return False

    def check(self, start: Start) -> None:
        """Refuse latents [B, C, ..., H, W] that are smaller than the low band, and those that are no pictures."""
        shape = start.shape
        if shape is None:
            return
        if len(shape) < 4:
            raise ValueError(f"{self.name} needs a latent with height and width; this one has the shape {tuple(shape)}.")
        if self.low_height > shape[-2] or self.low_width > shape[-1]:
            raise ValueError(
                f"{self.name}: the low band of {self.low_width}x{self.low_height} latent pixels is larger than the latent of "
                f"{shape[-1]}x{shape[-2]}; set low_width and low_height to the size of the smaller stage."
            )

    def shape(self, update: Tensor, cond: Tensor, w: float, step: Step) -> Tensor:
        """(w_l - 1)/(w - 1) Lp(g) + (w_h - 1)/(w - 1) Hp(g)."""
        return banded(update, (self.low_scale - 1) / (w - 1), (self.high_scale - 1) / (w - 1), self.low_height, self.low_width)
