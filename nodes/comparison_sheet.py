"""The comparison's labelled grid and table, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..pictures.text import line_height, unwritable, wrapped, write

_INK, _SOFT, _PAPER = "#1f2933", "#5f6b7a", "#ffffff"
_SMALLEST = 256  # pixels: cells that are smaller are enlarged, so that there is room for their labels


@dataclass(frozen=True)
class Column:
    """images [B, H, W, 3] in [0, 1], what made them, and what that took."""

    label: str
    images: Tensor
    nfe: float
    seconds: float

    @cached_property
    def saturation(self) -> float:
        """Mean HSV saturation."""
        high, low = self.images[..., :3].amax(dim=-1), self.images[..., :3].amin(dim=-1)
        return float(((high - low) / high.clamp(min=1 / 255)).double().mean())


def table(columns: Sequence[Column], settings: str) -> str:
    """The numbers of every column as aligned text, and the characters that the picture could not show."""
    rows = [("", "NFE", "seconds", "saturation", "model")]
    rows += [(str(n), _number(c.nfe), f"{c.seconds:.2f}", f"{c.saturation:.3f}", _in_line(c.label)) for n, c in enumerate(columns, 1)]
    lines = [settings, ""]
    lines += [f"{number:>3}  {nfe:>6}  {seconds:>8}  {saturation:>10}  {label}" for number, nfe, seconds, saturation, label in rows]
    for number, column in enumerate(columns, 1):
        missing = unwritable(column.label)
        if missing:
            lines += ["", f"No font on this machine has {' '.join(missing)}, so the picture calls column {number} only by its number. "
                          "Install a font that has them, such as Noto Sans CJK, and restart ComfyUI."]  # fmt: skip
    return "\n".join(lines)


def draw(columns: Sequence[Column], settings: str) -> Tensor:
    """The grid as an IMAGE [1, H, W, 3]: a column for each model, a row for each image; pixels of the images are kept as they are."""
    height, width = (max(column.images.shape[axis] for column in columns) for axis in (1, 2))
    factor = max(1, _SMALLEST // max(height, width))
    height, width = height * factor, width * factor
    unit = max(width, 160) / 256  # labels grow with the cells
    small, size, gap = (max(1, round(pixels * unit)) for pixels in (12, 15, 10))
    heads = [wrapped(_shown(number, column.label), size, width) for number, column in enumerate(columns, 1)]
    left, top = 3 * gap, 2 * gap + line_height(size)
    below = top + max(head.count("\n") + 1 for head in heads) * line_height(size) + 3 * line_height(small) + gap
    rows = max(len(column.images) for column in columns)
    paper = Image.new("RGB", (left + len(columns) * (width + gap), below + rows * (height + gap)), _PAPER)
    pen = ImageDraw.Draw(paper)
    write(pen, (left, gap), wrapped(settings, small, paper.width - left - gap).partition("\n")[0], small, _SOFT)
    for number, (column, head) in enumerate(zip(columns, heads, strict=True)):
        x = left + number * (width + gap)
        write(pen, (x, top), head, size, _INK)
        numbers = f"NFE {_number(column.nfe)}\n{column.seconds:.2f} s\nsaturation {column.saturation:.3f}"
        write(pen, (x, top + (head.count("\n") + 1) * line_height(size)), numbers, small, _SOFT)
    for row in range(rows):
        write(pen, (gap, below + row * (height + gap)), str(row + 1), small, _SOFT)
    grid = torch.from_numpy(np.asarray(paper, dtype=np.float32) / 255)
    for number, column in enumerate(columns):
        _paste(grid, column.images, left + number * (width + gap), below, height + gap, factor)
    return grid[None]


def _paste(grid: Tensor, images: Tensor, x: int, y: int, pitch: int, factor: int) -> None:
    """Put one column's images [B, H, W, 3] into the grid [H', W', 3], every pixel ``factor`` times in both directions."""
    for row, image in enumerate(images):
        large = image[..., :3].repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)
        grid[y + row * pitch : y + row * pitch + large.shape[0], x : x + large.shape[1]] = large


def _shown(number: int, label: str) -> str:
    """A label as far as it can be drawn: its column's number where a font for it is missing."""
    return f"{number} (see the table)" if unwritable(label) else label


def _in_line(label: str) -> str:
    return "; ".join(label.split("\n"))


def _number(value: float) -> str:
    """A count that need not be whole."""
    return f"{round(value, 2):g}"
