"""The comparison's labelled grid and table, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .colour import mean_saturation
from .text import line_height, unwritable, wrapped, write

_INK, _SOFT, _PAPER = "#1f2933", "#5f6b7a", "#ffffff"
_SMALLEST = 256  # pixels: cells that are smaller are enlarged, so that their labels fit


@dataclass(frozen=True)
class LabelledPictures:
    """images [B, H, W, 3] in [0, 1], what made them, and what that took."""

    label: str
    images: Tensor
    nfe: float
    seconds: float

    @cached_property
    def saturation(self) -> float:
        """Mean HSV saturation."""
        return mean_saturation(255 * self.images[..., :3].numpy())


def table(columns: Sequence[LabelledPictures], settings: str) -> str:
    """The numbers of every column as aligned text, and the characters that the picture could not show."""
    rows = [("", "NFE", "seconds", "saturation", "model")]
    rows += [(str(n), _number(c.nfe), f"{c.seconds:.2f}", f"{c.saturation:.3f}", _in_line(c.label)) for n, c in enumerate(columns, 1)]
    lines = [settings, ""]
    lines += [f"{number:>3}  {nfe:>6}  {seconds:>8}  {saturation:>10}  {label}" for number, nfe, seconds, saturation, label in rows]
    for number, column in enumerate(columns, 1):
        missing = unwritable(column.label)
        if missing:
            lines += ["", f"No font on this machine has {' '.join(missing)}, so the picture calls column {number} only by its number. "
                          "Install a font that has them, such as one of the Noto fonts, and restart ComfyUI."]  # fmt: skip
    return "\n".join(lines)


def draw(columns: Sequence[LabelledPictures], settings: str) -> Tensor:
    """The grid as an IMAGE [1, H, W, 3]: a column for each model, a row for each image; pixels of the images are kept as they are."""
    sheet = _Sheet.of(columns, settings)
    paper = Image.new("RGB", sheet.size, _PAPER)
    pen = ImageDraw.Draw(paper)
    write(pen, (sheet.left, sheet.gap), sheet.settings, sheet.small, _SOFT)
    for number, (column, head) in enumerate(zip(columns, sheet.heads, strict=True)):
        x, y = sheet.x(number), sheet.top
        write(pen, (x, y), head, sheet.large, _INK)
        write(pen, (x, y + _height(head, sheet.large)), _numbers(column), sheet.small, _SOFT)
    for row in range(sheet.rows):
        write(pen, (sheet.gap, sheet.y(row)), str(row + 1), sheet.small, _SOFT)
    grid = torch.from_numpy(np.asarray(paper, dtype=np.float32) / 255)
    for number, column in enumerate(columns):
        for row, image in enumerate(column.images):
            _paste(grid, image, sheet.x(number), sheet.y(row), sheet.factor)
    return grid[None]


@dataclass(frozen=True)
class _Sheet:
    """Where everything is, in pixels. heads, settings: the texts in lines that fit. factor: how often a pixel of an image is repeated."""

    heads: list[str]
    settings: str
    factor: int
    cell: tuple[int, int]
    rows: int
    small: int
    large: int
    gap: int

    @classmethod
    def of(cls, columns: Sequence[LabelledPictures], settings: str) -> _Sheet:
        """Cells as large as the largest image, and texts that grow with them."""
        height, width = (max(column.images.shape[axis] for column in columns) for axis in (1, 2))
        factor = max(1, _SMALLEST // max(height, width))
        cell = (width * factor, height * factor)
        small, large, gap = (max(1, round(pixels * max(cell[0], 160) / 256)) for pixels in (12, 15, 10))
        heads = [wrapped(_shown(number, column.label), large, cell[0]) for number, column in enumerate(columns, 1)]
        settings = wrapped(settings, small, len(columns) * (cell[0] + gap) - gap)
        return cls(heads, settings, factor, cell, max(len(column.images) for column in columns), small, large, gap)

    @property
    def left(self) -> int:
        """Left edge of the columns, right of the rows' numbers."""
        return 3 * self.gap

    @property
    def top(self) -> int:
        """Upper edge of the columns' heads, below the settings."""
        return 2 * self.gap + _height(self.settings, self.small)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        return self.x(len(self.heads)), self.y(self.rows)

    def x(self, number: int) -> int:
        """Left edge of a column."""
        return self.left + number * (self.cell[0] + self.gap)

    def y(self, row: int) -> int:
        """Upper edge of a row, below all heads."""
        heads = max(_height(head, self.large) for head in self.heads) + 3 * line_height(self.small)
        return self.top + heads + self.gap + row * (self.cell[1] + self.gap)


def _height(text: str, size: int) -> int:
    return (text.count("\n") + 1) * line_height(size)


def _numbers(column: LabelledPictures) -> str:
    return f"NFE {_number(column.nfe)}\n{column.seconds:.2f} s\nsaturation {column.saturation:.3f}"


def _paste(grid: Tensor, image: Tensor, x: int, y: int, factor: int) -> None:
    """Put an image [H, W, 3] into the grid [H', W', 3], every pixel ``factor`` times in both directions."""
    large = image[..., :3].repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)
    grid[y : y + large.shape[0], x : x + large.shape[1]] = large


def _shown(number: int, label: str) -> str:
    """A label as far as it can be drawn: its column's number where a font for it is missing."""
    return f"{number} (see the table)" if unwritable(label) else label


def _in_line(label: str) -> str:
    return "; ".join(label.split("\n"))


def _number(value: float) -> str:
    """A count that need not be whole."""
    return f"{round(value, 2):g}"
