"""The report's picture and table, drawn with Pillow."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..guiders.run import RunLog

_SIZE = (880, 520)
_MARGIN = (70, 84, 30, 56)  # left, top, right, bottom
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44", "#66ccee")
_INK, _PAPER, _GRID = "#222222", "#ffffff", "#dddddd"


def table(log: RunLog) -> str:
    """The counters as text, one per line."""
    per_image = log.seconds / max(log.batch, 1)
    return "\n".join(
        f"{label:<12}{value}"
        for label, value in (
            ("steps", log.steps),
            ("batch", log.batch),
            ("NFE", log.nfe),
            ("rows", log.rows),
            ("calls", log.calls),
            ("seconds", f"{log.seconds:.2f} ({per_image:.2f} per image)"),
        )
    )


def draw(log: RunLog) -> torch.Tensor:
    """The curves as an IMAGE [1, H, W, 3] in [0, 1]."""
    picture = Image.new("RGB", _SIZE, _PAPER)
    pen = ImageDraw.Draw(picture)
    left, top, right, bottom = _MARGIN[0], _MARGIN[1], _SIZE[0] - _MARGIN[2], _SIZE[1] - _MARGIN[3]
    title = f"{log.steps} steps, {log.nfe} evaluations (NFE), {log.calls} calls, {log.rows} rows, {log.seconds:.1f} s"
    pen.text((left, 18), title, fill=_INK, font=ImageFont.load_default(20))
    values = [value for points in log.curves.values() for value in points.values()]
    low, high = min([0.0, *values]), max([1.0, *values]) * 1.05
    small = ImageFont.load_default(14)
    for tick in range(5):
        level = low + (high - low) * tick / 4
        y = bottom - (bottom - top) * tick / 4
        pen.line([(left, y), (right, y)], fill=_GRID)
        pen.text((left - 8, y), f"{level:.2f}", fill=_INK, font=small, anchor="rm")
    last = max(log.steps - 1, 1)
    for step in sorted({round(last * share / 5) for share in range(6)}):
        pen.text((left + (right - left) * step / last, bottom + 8), str(step), fill=_INK, font=small, anchor="ma")
    pen.text(((left + right) / 2, bottom + 30), "step", fill=_INK, font=small, anchor="ma")
    x = left
    for number, (label, points) in enumerate(log.curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        line = [
            (left + (right - left) * step / last, bottom - (bottom - top) * (value - low) / (high - low)) for step, value in points.items()
        ]
        pen.line(line, fill=colour, width=3)
        for px, py in line:
            pen.ellipse([px - 3, py - 3, px + 3, py + 3], fill=colour)
        pen.text((x, 54), label, fill=colour, font=small)
        x += pen.textlength(label, font=small) + 22
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
