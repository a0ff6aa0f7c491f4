"""Autoguidance and the guidance interval on a tree whose branches are thin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from lodestar.guiders.terms.autoguidance import autoguidance_update

from .mixtures import Denoiser, edm_sigmas, fractal, heun
from .panels import COLOURS, FAINT, Panel, figure

TREE, OTHER_TREE = fractal(math.pi / 4), fractal(math.pi * 5 / 4, seed=3)
MAIN, WEAK = TREE.blurred(0.02), TREE.blurred(0.05)  # two networks that fail to resolve thin branches, one of them worse
UNCOND = (TREE | OTHER_TREE).blurred(0.05)


def scene(n: int, steps: int = 24) -> dict[str, Tensor]:
    """Points of one class of the tree, by method. All start from the same noise."""

    def cfg(w: float, low: float, high: float) -> Denoiser:
        return lambda x, sigma: UNCOND.denoised(x, sigma).lerp(MAIN.denoised(x, sigma), w if low < sigma <= high else 1.0)

    def autoguidance(x: Tensor, sigma: float) -> Tensor:
        cond = MAIN.denoised(x, sigma)
        return cond + autoguidance_update(cond, WEAK.denoised(x, sigma), 3.0)

    start, sigmas = TREE.draw(n, seed=1, sigma=5.0), edm_sigmas(steps)
    methods = {
        "no guidance": MAIN.denoised,
        "CFG, w 4": cfg(4.0, 0.0, math.inf),
        "autoguidance, w 3": autoguidance,
        "CFG, w 4, interval": cfg(4.0, 0.05, 0.3),
    }
    return {"data": TREE.draw(n, seed=2)} | {name: heun(denoise, start, sigmas) for name, denoise in methods.items()}


def measures(x: Tensor) -> tuple[float, int]:
    """(share of points off the data's support, number of branches that got less than a quarter of their share)."""
    truth = TREE.draw(8000, seed=3)
    outside = TREE.log_density(x) < TREE.log_density(truth).quantile(0.01)
    return outside.double().mean().item(), int((TREE.shares(x) < TREE.shares(truth) / 4).sum())


def draw(file: Path, found: dict[str, Tensor], methods: Sequence[str]) -> list[str]:
    """The data in grey, the points of a method on it."""
    support = TREE.draw(3000, seed=4)

    def show(points: Tensor, panel: Panel) -> None:
        panel.dots(support, FAINT, 2.5)
        panel.dots(points, COLOURS[0], 1.8)

    panels, branches = [], len(TREE.branch.unique())
    for method in methods:
        outside, lost = measures(found[method])
        panels.append((method, f"{outside:.0%} off the data, {lost} of {branches} branches lost", partial(show, found[method])))
    low, high = TREE.means.amin(0), TREE.means.amax(0)
    return figure(file, tuple(((low + high) / 2).tolist()), 1.1 * (high - low).max().item(), panels)
