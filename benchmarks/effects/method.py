"""What a file of ``methods`` says: which pictures a method needs, and what its paper claims of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import methods as folder
from .cells import Cell, guided
from .claims import Claim, Results
from .metrics import ACCURACY, FRECHET, PRECISION, RECALL, SATURATION, Metric

CFG_SCALES = (1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)


@dataclass(frozen=True)
class Curve:
    """A line of a method's picture: cells over the method's scale."""

    label: str
    model: str
    points: tuple[tuple[float, Cell], ...]


@dataclass(frozen=True)
class Method:
    """A method's part of the benchmark.

    title: the node's display name.
    claims: the rows of the table, given finished cells.
    curves: lines over ``axis``, one panel for each of ``panels``.
    strips: cells whose first pictures are shown side by side, by model.
    of_a_paper: whether the claims are a paper's; those of our own additions do not count as such.
    """

    title: str
    axis: str
    claims: Callable[[Results], Sequence[Claim]]
    curves: tuple[Curve, ...]
    strips: tuple[Cell, ...] = ()
    others: tuple[Cell, ...] = ()
    panels: tuple[Metric, ...] = (FRECHET, ACCURACY, PRECISION, RECALL, SATURATION)
    of_a_paper: bool = True

    @property
    def cells(self) -> list[Cell]:
        """Everything that has to be made, once each."""
        return list(dict.fromkeys([*(cell for curve in self.curves for _, cell in curve.points), *self.strips, *self.others]))


def cfg(model: str, scale: float) -> Cell:
    """Plain CFG, the baseline of most claims."""
    return guided(model, f"CFG {scale:g}", scale)


def cfg_sweep(model: str, scales: Sequence[float] = CFG_SCALES) -> Curve:
    """Plain CFG over its scale."""
    return Curve("CFG", model, tuple((scale, cfg(model, scale)) for scale in scales))


def cells_of(curve: Curve) -> list[Cell]:
    """A curve's cells, in the order of its axis."""
    return [cell for _, cell in curve.points]


def methods() -> dict[str, Method]:
    """Every file's METHOD by the file's name."""
    names = sorted(module.name for module in pkgutil.iter_modules(folder.__path__))
    return {name: importlib.import_module(f"{folder.__name__}.{name}").METHOD for name in names}
