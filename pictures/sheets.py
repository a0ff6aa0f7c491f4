"""Labelled picture sheets, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw

from .text import unwritable, wrapped, write

CELL, GAP, HEAD, SIDE = 256, 12, 84, 190  # pixels: a cell's side, between cells, labels above them and at their left
_INK, _FAINT, _PAPER = "#222222", "#666666", "#ffffff"


def comparison(
    heads: Sequence[tuple[str, ...]], sides: Sequence[str], columns: Sequence[Sequence[Sequence[Image.Image]]], corner: str = ""
) -> Image.Image:
    """``columns[c][r]`` holds the pictures of one cell; ``heads`` are a column's lines of text, ``sides`` a row's sentence."""
    picture = Image.new("RGB", (SIDE + len(heads) * (CELL + GAP) + GAP, HEAD + len(sides) * (CELL + GAP) + GAP), _PAPER)
    pen = ImageDraw.Draw(picture)
    write(pen, (GAP, GAP), corner, 14, _FAINT)
    for c, (head, cells) in enumerate(zip(heads, columns, strict=True)):
        x = SIDE + GAP + c * (CELL + GAP)
        write(pen, (x, GAP), head[0], 22, _INK)
        for line, text in enumerate(head[1:]):
            write(pen, (x, GAP + 30 + 18 * line), text, 14, _FAINT)
        for r, pictures in enumerate(cells):
            picture.paste(tiled(pictures), (x, HEAD + r * (CELL + GAP)))
    for r, side in enumerate(sides):
        shown = f"Prompt {r + 1}\n(see the table)" if unwritable(side) else wrapped(side, 16, SIDE - GAP)
        write(pen, (GAP, HEAD + r * (CELL + GAP)), shown, 16, _INK)
    return picture


def tiled(pictures: Sequence[Image.Image], side: int = CELL) -> Image.Image:
    """Pictures in the smallest square grid that holds them, ``side`` pixels wide; small ones keep their pixels visible."""
    across = math.ceil(math.sqrt(len(pictures)))
    tile = side // across
    grid = Image.new("RGB", (side, side), _PAPER)
    for number, picture in enumerate(pictures):
        method = Image.Resampling.NEAREST if max(picture.size) < tile else Image.Resampling.LANCZOS
        scale = tile / max(picture.size)
        shown = picture.resize([max(1, round(length * scale)) for length in picture.size], method)
        grid.paste(shown, (number % across * tile, number // across * tile))
    return grid
