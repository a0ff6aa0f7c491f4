"""What policies made of a run, as a strip: one cell for each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from PIL import ImageDraw, ImageFont

from ..guiders.engine.choice import Choice

HEIGHT = 58  # with the legend above
_CELL, _ABOVE = 22, 30
_KINDS = {"CFG": "#3366aa", "predicted": "#b37400", "conditional": "#bcd9c3", "unconditional": "#b9bec6"}
_LIGHT = ("CFG", "predicted")  # cells on which text is white


def kind_of(choice: Choice) -> str:
    """What a step did, in the legend's words. Rows of a batch that have switched to D_c are not counted here."""
    if choice.weight == 0:
        return "unconditional"
    if choice.weight == 1 or choice.uncond is False:
        return "conditional"
    return "predicted" if choice.predicted else "CFG"


def guided(choice: Choice) -> float:
    """Share of the batch's rows that use D_u."""
    return sum(choice.uncond) / len(choice.uncond) if isinstance(choice.uncond, tuple) else float(choice.uncond)


def wanted(choices: Mapping[int, Choice]) -> bool:
    """Whether a policy changed anything."""
    return any(choice != Choice() for choice in choices.values())


def draw_strip(
    pen: ImageDraw.ImageDraw,
    choices: Mapping[int, Choice],
    y: int,
    left: int,
    width: float,
    x: Callable[[int], float],
    font: Callable[[int], ImageFont.FreeTypeFont],
    ink: str,
) -> None:
    """Cells of ``width`` pixels around ``x(step)`` below ``y``; where only some rows are guided, the cell is filled from below."""
    label_x = float(left)
    for kind in (kind for kind in _KINDS if kind in map(kind_of, choices.values())):
        pen.rectangle([label_x, y + 7, label_x + 14, y + 19], fill=_KINDS[kind])
        pen.text((label_x + 20, y + 13), kind, fill=ink, font=font(14), anchor="lm")
        label_x += 44 + pen.textlength(kind, font=font(14))
    top, bottom = y + _ABOVE, y + _ABOVE + _CELL
    for step, choice in choices.items():
        kind, middle = kind_of(choice), x(step)
        edges = middle - width / 2 + 1, middle + width / 2 - 1
        share = guided(choice) if kind in _LIGHT else 1.0
        pen.rectangle([edges[0], top, edges[1], bottom], fill=_KINDS["conditional"])
        pen.rectangle([edges[0], bottom - share * _CELL, edges[1], bottom], fill=_KINDS[kind])
        text = f"{choice.weight:g}" if kind == "CFG" and choice.weight is not None else ""
        if pen.textlength(text, font=font(11)) < width - 2:
            pen.text((middle, (top + bottom) / 2), text, fill="#ffffff", font=font(11), anchor="mm")
