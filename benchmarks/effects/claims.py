"""Claims: what a paper says a method does, as a difference between two cells with an interval, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .cells import Cache, Cell, Made, scenes_for
from .metrics import Metric, Pictures, Real, Resamples

VERDICTS = ("holds", "fails", "undecided")


@dataclass(frozen=True)
class Claim:
    """One row of the table: ``cell`` against ``baseline`` in one metric.

    text: the paper's claim, in the reader's words.
    margin: how much worse still counts as "no worse"; 0 where the claim is "better".
    why: the most likely reason, with evidence, where it does not hold here.
    """

    text: str
    cell: Cell
    baseline: Cell
    metric: Metric
    margin: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Effect:
    """A number with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass
class Results:
    """Finished cells and everything that is measured on them. A method's ``claims`` function gets it and asks for what it compares."""

    cache: Cache
    prompted: Real
    unprompted: Real
    resamples: Resamples
    _samples: dict[Cell, Pictures] = field(default_factory=dict)
    _values: dict[tuple[Cell, str], tuple[float, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, cache: Cache) -> Results:
        """With fresh data to compare with."""
        captions, everything = Real.of_captions(scenes_for(cache.samples)), Real.of_everything(cache.samples)
        return cls(cache, captions, everything, Resamples.of(cache.samples))

    def real(self, cell: Cell) -> Real:
        """The data that a cell should look like."""
        return self.prompted if dict(cell.settings).get("prompts", True) else self.unprompted

    def made(self, cell: Cell) -> Made:
        """Pictures as bytes, and their cost."""
        return self.cache.load(cell)

    def pictures(self, cell: Cell) -> Pictures:
        """Pictures with their captions."""
        if cell not in self._samples:
            self._samples[cell] = Pictures(self.made(cell).pictures / 255, scenes_for(self.cache.samples))
        return self._samples[cell]

    def measure(self, cell: Cell, metric: Metric) -> Effect:
        """A metric of one cell."""
        value, resampled = self._measured(cell, metric)
        return interval(value, resampled)

    def best(self, cells: Sequence[Cell], metric: Metric) -> Cell:
        """The cell of a sweep with the best value."""
        return max(cells, key=lambda cell: metric.sign * self._measured(cell, metric)[0])

    def effect(self, claim: Claim) -> Effect:
        """How much better the claim's cell is than its baseline (negative: worse), resampled together."""
        value, resampled = self._measured(claim.cell, claim.metric)
        other, other_resampled = self._measured(claim.baseline, claim.metric)
        return interval(claim.metric.sign * (value - other), claim.metric.sign * (resampled - other_resampled))

    def _measured(self, cell: Cell, metric: Metric) -> tuple[float, np.ndarray]:
        key = (cell, metric.name)
        if key not in self._values:
            function = metric.of(self.pictures(cell), self.real(cell))
            self._values[key] = function(self.resamples.everything), np.array([function(rows) for rows in self.resamples.rows])
        return self._values[key]


def interval(value: float, resampled: np.ndarray) -> Effect:
    """Percentile bootstrap, centred on the value: resampling repeats pictures, which shifts a Fréchet distance upward."""
    low, high = np.quantile(resampled - resampled.mean(), [0.025, 0.975])
    return Effect(float(value), float(value + low), float(value + high))


def verdict(claim: Claim, effect: Effect) -> str:
    """holds: the whole interval is on the claimed side; fails: none of it is; undecided: more samples are needed."""
    if effect.low > -claim.margin:
        return "holds"
    return "fails" if effect.high <= -claim.margin else "undecided"
