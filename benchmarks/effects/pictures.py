"""One picture per method: every measure over the method's scale, and the first samples of a few settings side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .cells import PER_CAPTION, Cell
from .claims import Results
from .method import Curve, Method
from .metrics import Metric

ACROSS = 16  # samples in a strip, each of another caption
COLOURS = ("#8a8a8a", "#1f6fb4", "#d2691e", "#2e8b57", "#8e44ad")


def draw(method: Method, results: Results, path: Path) -> None:
    """Draw and save as PNG."""
    kinds = list(dict.fromkeys(curve.model for curve in method.curves))
    heights = [*(2.4 for _ in kinds), *(0.62 for _ in method.strips)]
    figure = Figure(figsize=(2.7 * len(method.panels), sum(heights) + 0.8), layout="constrained", dpi=80)
    figure.suptitle(f"{method.title}: {results.cache.samples} pictures per point, bands are 95 % intervals")
    grid = figure.add_gridspec(len(heights), len(method.panels), height_ratios=heights)
    for row, kind in enumerate(kinds):
        for column, metric in enumerate(method.panels):
            axes = figure.add_subplot(grid[row, column])
            panel(axes, metric, [curve for curve in method.curves if curve.model == kind], results)
            axes.set_title(f"{kind}: {metric.name}", fontsize=9)
            axes.set_xlabel(method.axis, fontsize=8)
            if row == column == 0:
                axes.legend(fontsize=7)
    for row, cell in enumerate(method.strips, start=len(kinds)):
        strip(figure.add_subplot(grid[row, :]), cell, results.made(cell).pictures)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)


def panel(axes: Axes, metric: Metric, curves: Sequence[Curve], results: Results) -> None:
    """One measure of some curves."""
    for curve, colour in zip(curves, COLOURS, strict=False):
        x = [scale for scale, _ in curve.points]
        effects = [results.measure(cell, metric) for _, cell in curve.points]
        axes.plot(x, [effect.value for effect in effects], color=colour, marker="o", markersize=3, label=curve.label)
        axes.fill_between(x, [effect.low for effect in effects], [effect.high for effect in effects], color=colour, alpha=0.2, linewidth=0)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def strip(axes: Axes, cell: Cell, pictures: Tensor) -> None:
    """The first picture of the first captions; every strip has the same captions and noise."""
    shown = pictures[::PER_CAPTION][:ACROSS]
    axes.imshow(np.asarray(rearrange(shown, "b c h w -> h (b w) c")), interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"{cell['model']}, {cell.label}", fontsize=8, loc="left", pad=2)
