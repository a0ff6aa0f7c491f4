"""Curves of a run: one number per step and label, on the device until they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Point = tuple[str, int]  # label and step


@dataclass(frozen=True)
class Flight:
    """Values on their way from a device."""

    points: Sequence[Point]
    values: Tensor
    arrived: torch.cuda.Event | None  # None: they are there

    @classmethod
    def begin(cls, points: Sequence[Point], values: Sequence[Tensor]) -> Flight:
        """Only CUDA copies in the background; other devices are waited for."""
        stacked = torch.stack(list(values))
        if not stacked.is_cuda:
            return cls(points, stacked.cpu(), None)
        copy = stacked.to("cpu", non_blocking=True)
        return cls(points, copy, torch.cuda.current_stream(stacked.device).record_event())


@dataclass
class Curves:
    """values: what has been read. A label is there as soon as its first value is recorded."""

    values: dict[str, dict[int, float]] = field(default_factory=dict)
    _waiting: dict[Point, Tensor] = field(default_factory=dict)
    _flights: list[Flight] = field(default_factory=list)

    def record(self, label: str, step: int, value: Tensor) -> None:
        """Keep a number []; it stays on its device."""
        self.values.setdefault(label, {})
        self._waiting[label, step] = value

    def glance(self) -> None:
        """Read what a device has handed over, and ask it for the rest, without waiting for it."""
        self._land(wait=False)
        if not self._flights:
            self._start()
            self._land(wait=False)

    def read(self) -> None:
        """Read everything."""
        self._land(wait=True)
        self._start()
        self._land(wait=True)

    def _start(self) -> None:
        for device in {value.device for value in self._waiting.values()}:
            points = [point for point, value in self._waiting.items() if value.device == device]
            self._flights.append(Flight.begin(points, [self._waiting[point] for point in points]))
        self._waiting.clear()

    def _land(self, wait: bool) -> None:
        flights, self._flights = self._flights, []
        for flight in flights:
            if flight.arrived is not None and not flight.arrived.query():
                if not wait:
                    self._flights.append(flight)
                    continue
                flight.arrived.synchronize()
            for (label, step), value in zip(flight.points, flight.values.tolist(), strict=True):
                self.values[label][step] = value
