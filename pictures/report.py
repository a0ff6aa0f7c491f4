"""The report's picture and table, drawn with Pillow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle
from statistics import mean

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..guiders.engine.curves import Kind, Quantity
from ..guiders.engine.log import RunLog, Switch
from . import policy_strip

_WIDTH = 960
_PANELS: dict[Kind, tuple[str, int]] = {  # title and height of the panel for each kind of curve, from top to bottom
    "update": ("size of each update, relative to the denoised image", 300),
    "weight": ("weight of plain CFG that does the same in the step", 150),
    "error": ("error, relative to what was measured", 150),
    "cosine": ("direction", 150),
}
_LEFT, _RIGHT, _TOP, _GAP, _FOOT = 76, 28, 62, 62, 66  # margins, and the space above and below the panels
_COLOURS = ("#3366aa", "#cc3d52", "#228833", "#8e4aa8", "#b37400", "#1b8fa8", "#666666", "#8a5a44")
_INK, _SOFT, _GRID, _PAPER = "#1f2933", "#5f6b7a", "#e3e8ee", "#ffffff"
_LARGEST_RATIO = 30  # curves whose largest values differ by more share a logarithmic axis

Curve = Mapping[int, float]  # step -> value


def table(log: RunLog) -> str:
    """The counters, and first, mean and last value of every curve, as aligned text."""
    whole = log.nfe + log.saved
    rows = [
        ("steps", log.steps, ""),
        ("batch", log.batch, ""),
        ("NFE", _number(log.nfe), f"{log.nfe / max(log.steps, 1):.2f} per step"),
        *([("saved", _number(log.saved), f"of {_number(whole)} NFE ({log.saved / whole:.0%}), left out by policies")] if log.saved else []),
        *((name, _number(mean(shares.values())), _sharing(shares, log.unshared)) for name, shares in log.shares.items()),
        *((name, _number(spent), f"{spent / max(log.steps, 1):.2f} per step") for name, spent in log.spent.items()),
        ("rows", log.rows, ""),
        ("calls", log.calls, ""),
        ("seconds", f"{log.seconds:.2f}", f"{log.seconds / max(log.batch, 1):.2f} per image"),
    ]
    lines = [f"{label:<9}{value!s:>8}  {note}".rstrip() for label, value, note in rows]
    if log.curves:
        width = max(len(quantity.name) for quantity in log.curves)
        lines += ["", f"{'curve':<{width}}  {'steps':>7}{'first':>10}{'mean':>10}{'last':>10}"]
    for quantity, curve in log.curves.items():
        values = list(curve.values())
        numbers = "".join(f"{value:>10.4f}" for value in (values[0], mean(values), values[-1]))
        lines.append(f"{quantity.name:<{width}}  {f'{min(curve)}-{max(curve)}':>7}{numbers}")
    for name, switch in log.switches.items():
        first = ", ".join("-" if step is None else str(step) for step in switch.steps)
        lines += ["", f"{name}, threshold {switch.threshold:g}: first step without CFG, for each image: {first or '-'}"]
    return "\n".join(lines)


def _sharing(shares: Mapping[int, float], unshared: str) -> str:
    """What a term's number says."""
    if min(shares.values()) < 1:
        return "of an evaluation: what comes before its layers is computed once"
    because = f", because {unshared} changes layers before its own" if unshared else ""
    return f"of an evaluation: nothing is shared{because}"


def _number(value: float) -> str:
    """A count that need not be whole."""
    return f"{round(value, 2):g}"


def draw(log: RunLog) -> torch.Tensor:
    """The curves as an IMAGE [1, H, W, 3] in [0, 1]: the updates above, weights and cosines on axes of their own below."""
    curves = {kind: {of: curve for of, curve in log.curves.items() if of.kind == kind} for kind in _PANELS}
    shown = [kind for kind in _PANELS if curves[kind] or kind == "update"]
    strip = policy_strip.HEIGHT if policy_strip.wanted(log.choices) else 0
    height = _TOP + strip + sum(_GAP + _PANELS[kind][1] for kind in shown) + _FOOT
    picture = Image.new("RGB", (_WIDTH, height), _PAPER)
    pen = ImageDraw.Draw(picture)
    title = f"{_number(log.nfe)} evaluations (NFE) in {log.steps} steps" + (f", {_number(log.saved)} saved" if log.saved else "")
    costs = f"batch {log.batch}:  {log.rows} rows in {log.calls} model calls,  {log.seconds:.2f} s"
    pen.text((_LEFT, 18), title, fill=_INK, font=_font(22))
    pen.text((_LEFT, 48), costs, fill=_SOFT, font=_font(15))
    colours = dict(zip(chain(*curves.values()), cycle(_COLOURS)))
    if strip:
        width = min((_WIDTH - _LEFT - _RIGHT) / log.steps, 28.0)
        policy_strip.draw_strip(pen, log.choices, _TOP + 8, _LEFT, width, partial(_x, steps=log.steps), _font, _INK)
    y = _TOP + strip
    for kind in shown:
        top, y = y + _GAP, y + _GAP + _PANELS[kind][1]
        _panel(pen, kind, curves[kind], colours, log, (top, y))
    _schedule(pen, log, y)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


@dataclass(frozen=True)
class _Axis:
    """Values from ``low`` to ``high`` on the pixels from ``bottom`` up to ``top``."""

    low: float
    high: float
    log: bool
    top: int
    bottom: int

    @classmethod
    def of(cls, curves: Mapping[Quantity, Curve], zoomed: bool, span: tuple[int, int], more: Sequence[float] = ()) -> _Axis:
        """An axis for these curves and more values; ``zoomed``: around them, otherwise from 0."""
        values = [value for curve in curves.values() for value in curve.values() if math.isfinite(value)] or [0.0, 1.0]
        values += more
        peaks = [max(curve.values()) for curve in curves.values()]
        if zoomed:
            low, high = min(values), max(values)
            margin = max((high - low) * 0.1, 1e-4)
            return cls(low - margin, min(high + margin, 1.0) if high <= 1 else high + margin, False, *span)
        if min(peaks, default=1.0) > 0 and max(peaks, default=1.0) / min(peaks, default=1.0) > _LARGEST_RATIO:
            low = max(min(value for value in values if value > 0), max(values) * 1e-4)
            return cls(10 ** math.floor(math.log10(low)), max(values) * 1.3, True, *span)
        return cls(0.0, max(values) * 1.08 or 1.0, False, *span)

    def pixel(self, value: float) -> float:
        """Where a value is; what lies outside is put on the edge."""
        low, high, value = (math.log10(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if math.isfinite(value) else 1.0
        return self.bottom - min(max(share, 0.0), 1.0) * (self.bottom - self.top)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Round values, and how to write them."""
        if self.log:
            for power in range(round(math.log10(self.low)), math.floor(math.log10(self.high)) + 1):
                yield 10.0**power, f"{10.0**power:g}"
            return
        rough = (self.high - self.low) / (self.bottom - self.top) * 50  # a line for about every 50 pixels
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        for number in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1):
            yield number * step, f"{number * step:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _panel(
    pen: ImageDraw.ImageDraw,
    kind: Kind,
    curves: Mapping[Quantity, Curve],
    colours: Mapping[Quantity, str],
    log: RunLog,
    span: tuple[int, int],
) -> None:
    """Axis, legend and curves; thresholds, and where they were met."""
    switches = [switch for switch in log.switches.values() if switch.curve in curves]
    axis = _Axis.of(curves, kind == "cosine", span, [switch.threshold for switch in switches])
    pen.text((_LEFT, axis.top - 46), _PANELS[kind][0] + (" (logarithmic)" if axis.log else ""), fill=_SOFT, font=_font(14))
    for value, text in axis.ticks():
        y = axis.pixel(value)
        pen.line([(_LEFT, y), (_WIDTH - _RIGHT, y)], fill=_GRID)
        pen.text((_LEFT - 10, y), text, fill=_SOFT, font=_font(13), anchor="rm")
    if not curves:
        pen.text((_WIDTH / 2, (axis.top + axis.bottom) / 2), "nothing was recorded in this run", fill=_SOFT, font=_font(16), anchor="mm")
    x, small = float(_LEFT), _font(14)
    if sum(44 + pen.textlength(quantity.name, font=small) for quantity in curves) > _WIDTH - _LEFT:
        small = _font(11)
    for quantity, curve in curves.items():
        pen.rectangle([x, axis.top - 19, x + 14, axis.top - 15], fill=colours[quantity])
        pen.text((x + 20, axis.top - 17), quantity.name, fill=_INK, font=small, anchor="lm")
        x += 44 + pen.textlength(quantity.name, font=small)
        for part in _unbroken(curve):
            points = [(_x(step, log.steps), axis.pixel(value)) for step, value in part]
            pen.line(points, fill=colours[quantity], width=3, joint="curve")
            for px, py in points:
                pen.ellipse([px - 3, py - 3, px + 3, py + 3], fill=colours[quantity])

    for switch in switches:
        _switch(pen, switch, axis, colours[switch.curve], log.steps)


def _switch(pen: ImageDraw.ImageDraw, switch: Switch, axis: _Axis, colour: str, steps: int) -> None:
    """A line at the threshold, and a mark where images go on without CFG."""
    y = axis.pixel(switch.threshold)
    for x in range(_LEFT, _WIDTH - _RIGHT, 12):
        pen.line([(x, y), (x + 6, y)], fill=colour, width=2)
    pen.text((_LEFT + 4, y + 3), f"threshold {switch.threshold:g}", fill=colour, font=_font(13))
    met = Counter(step for step in switch.steps if step is not None)
    for step, images in sorted(met.items()):
        x = _x(step - 0.5, steps)
        pen.line([(x, axis.top), (x, axis.bottom)], fill=_SOFT)
        label = f"{images} of {len(switch.steps)}" if len(switch.steps) > 1 else "CFG ends"
        pen.text((x + 4, axis.bottom - 16), label, fill=_SOFT, font=_font(12))


def _unbroken(curve: Curve) -> Iterator[list[tuple[int, float]]]:
    """The pieces of a curve between steps at which nothing was recorded."""
    piece: list[tuple[int, float]] = []
    for step, value in sorted(curve.items()):
        if piece and step > piece[-1][0] + 1:
            yield piece
            piece = []
        piece.append((step, value))
    if piece:
        yield piece


def _schedule(pen: ImageDraw.ImageDraw, log: RunLog, y: int) -> None:
    """The axis of steps with the noise level at which each begins."""
    pen.text((_LEFT - 10, y + 10), "step", fill=_SOFT, font=_font(13), anchor="ra")
    pen.text((_LEFT - 10, y + 30), "sigma", fill=_SOFT, font=_font(13), anchor="ra")
    every = next(unit for unit in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if log.steps <= 11 * unit)
    for step in range(0, log.steps, every):
        pen.text((_x(step, log.steps), y + 10), str(step), fill=_INK, font=_font(13), anchor="ma")
        if step < len(log.sigmas):
            pen.text((_x(step, log.steps), y + 30), f"{log.sigmas[step]:.3g}", fill=_SOFT, font=_font(13), anchor="ma")


def _x(step: float, steps: int) -> float:
    left, right = _LEFT + 14, _WIDTH - _RIGHT - 14
    return left + (right - left) * (step / (steps - 1) if steps > 1 else 0.5)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
