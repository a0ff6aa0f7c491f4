"""Labelled picture sheets, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, HEAD, SIDE = 256, 12, 84, 190  # pixels: a cell's side, between cells, labels above and beside them
_INK, _FAINT, _PAPER = "#222222", "#666666", "#ffffff"

# Pillow's own font has ASCII alone. These are looked for where the system keeps its fonts.
_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "arial.ttf", "Arial Unicode.ttf",
    "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc",
)  # fmt: skip


def comparison(
    heads: Sequence[tuple[str, ...]], sides: Sequence[str], columns: Sequence[Sequence[Sequence[Image.Image]]], corner: str = ""
) -> Image.Image:
    """``columns[c][r]`` holds the pictures of one cell; ``heads`` are a column's lines of text, ``sides`` a row's sentence."""
    picture = Image.new("RGB", (SIDE + len(heads) * (CELL + GAP) + GAP, HEAD + len(sides) * (CELL + GAP) + GAP), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, GAP), corner, fill=_FAINT, font=font_for(corner, 14))
    for c, (head, cells) in enumerate(zip(heads, columns, strict=True)):
        x = SIDE + GAP + c * (CELL + GAP)
        write(pen, (x, GAP), head[0], 22)
        for line, text in enumerate(head[1:]):
            write(pen, (x, GAP + 30 + 18 * line), text, 14, _FAINT)
        for r, pictures in enumerate(cells):
            picture.paste(tiled(pictures), (x, HEAD + r * (CELL + GAP)))
    for r, side in enumerate(sides):
        place = (GAP, HEAD + r * (CELL + GAP))
        write(pen, place, wrapped(pen, side, 16, SIDE - GAP) or f"Prompt {r + 1}\n(see the table)", 16)
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


def write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: str = _INK) -> None:
    """Text in a font that has its characters."""
    pen.text(place, text, fill=colour, font=font_for(text, size) or ImageFont.load_default(size))


def wrapped(pen: ImageDraw.ImageDraw, text: str, size: int, width: int) -> str:
    """The text in lines of at most ``width`` pixels; nothing if no font at hand can write it."""
    font = font_for(text, size)
    if font is None:
        return ""
    lines = [""]
    spaced = " " in text.strip()
    for word in text.split() if spaced else text:
        longer = f"{lines[-1]} {word}".strip() if spaced else lines[-1] + word
        if lines[-1] and pen.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """The first font at hand that has every character of the text; None if there is none."""
    own = ImageFont.load_default(size)
    if text.isascii():
        return own
    for name in _FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        missing = bytes(font.getmask("\U0010ffff"))
        if all(character.isspace() or bytes(font.getmask(character)) != missing for character in text):
            return font
    return None
