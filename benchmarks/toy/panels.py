"""Figures: panels side by side, with dots and lines in the coordinates of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_PANEL, _TITLE, _SCALE = 300, 44, 2  # pixels; drawn twice as large, for smooth dots
INK, FAINT = "#1f2933", "#dbe2ea"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#b8860b", "#2a9d9d", "#7a5195", "#555555")


class Panel:
    """One square of a figure, in the coordinates of the data."""

    def __init__(self, pen: ImageDraw.ImageDraw, number: int, centre: tuple[float, float], width: float) -> None:
        self.pen, self.left, self.centre, self.width = pen, number * _PANEL * _SCALE, centre, width

    def at(self, point: Tensor) -> tuple[float, float]:
        """Pixels of a point [2]."""
        size = _PANEL * _SCALE
        x = (point[0].item() - self.centre[0]) / self.width + 0.5
        y = 0.5 - (point[1].item() - self.centre[1]) / self.width
        return self.left + x * size, _TITLE * _SCALE + y * size

    def dots(self, points: Tensor, colour: str, radius: float) -> None:
        """A dot at each point [n, 2]."""
        for x, y in (self.at(point) for point in points):
            self.pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)

    def lines(self, points: Tensor, colour: str) -> None:
        """A closed line through points [n, 2]."""
        self.pen.line([self.at(point) for point in [*points, points[0]]], fill=colour, width=_SCALE)

    def title(self, text: str, note: str) -> None:
        """Two lines above the square."""
        x = self.left + _PANEL * _SCALE / 2
        for y, line, size in ((4, text, 15), (24, note, 12)):
            self.pen.text((x, y * _SCALE), line, fill=INK, font=ImageFont.load_default(size * _SCALE), anchor="ma")


def figure(file: Path, centre: tuple[float, float], width: float, panels: Sequence[tuple[str, str, Callable[[Panel], None]]]) -> list[str]:
    """Draw panels (title, note, what draws them) side by side and save them as a small PNG; their rows for RESULTS.md."""
    picture = Image.new("RGB", (_PANEL * len(panels) * _SCALE, (_PANEL + _TITLE) * _SCALE), "#ffffff")
    pen = ImageDraw.Draw(picture)
    for number, (title, note, draw) in enumerate(panels):
        panel = Panel(pen, number, centre, width)
        draw(panel)
        panel.title(title, note)
    small = picture.resize((picture.width // _SCALE, picture.height // _SCALE), Image.Resampling.LANCZOS)
    small.quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")
    return [f"| {file.stem} | {title} | {note} |" for title, note, _ in panels]
