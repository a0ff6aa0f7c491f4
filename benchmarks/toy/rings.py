"""APG on a ring of classes. The norm of a point stands for saturation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lodestar.guiders.shapers.apg import projected_update

from .mixtures import Mixture, edm_sigmas, heun, only, ring
from .panels import COLOURS, FAINT, Panel, figure

RING = ring()


def scene(n: int, w: float = 7.0, steps: int = 24) -> dict[str, Tensor]:
    """Points of every class of the ring [classes * n, 2], by method. The norm of a point stands for saturation."""
    classes = len(RING.weights)

    def guided(update: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.cat([heun(partial(step, only(RING, k), update), starts[k], edm_sigmas(steps)) for k in range(classes)])

    def step(target: Mixture, update: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: float) -> Tensor:
        cond = target.denoised(x, sigma)
        return cond + (w - 1) * update(cond - RING.denoised(x, sigma), cond)

    starts = [only(RING, k).draw(n, seed=k, sigma=5.0) for k in range(classes)]
    return {
        "data": torch.cat([only(RING, k).draw(n, seed=k) for k in range(classes)]),
        f"CFG, w {w:g}": guided(lambda g, cond: g),
        f"APG, w {w:g}, eta 0": guided(lambda g, cond: projected_update(g, cond, eta=0.0, r=0.0)),
    }


def draw(file: Path, found: dict[str, Tensor]) -> list[str]:
    """The classes in colours, on the circle that holds the data."""
    angle = torch.linspace(0, 2 * math.pi, 120)
    circle = torch.stack([angle.cos(), angle.sin()], -1)

    def show(points: Tensor, panel: Panel) -> None:
        panel.lines(circle, FAINT)
        for colour, of_class in zip(COLOURS, points.chunk(len(RING.weights)), strict=True):
            panel.dots(of_class, colour, 3)

    panels = [(name, f"mean norm {x.norm(dim=1).mean():.2f}", partial(show, x)) for name, x in found.items()]
    return figure(file, (0.0, 0.0), 2.9, panels)
