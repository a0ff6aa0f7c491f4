"""Curves of a run: one number per step and quantity, on the device until they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["update", "weight", "cosine", "noise", "loss", "residual", "error"]


@dataclass(frozen=True)
class Quantity:
    """What a curve shows: its name in reports, and the kind of its values.

    update: size of an update, relative to the denoised image. weight: the weight of plain CFG that does the same in the step.
    cosine: of the conditional and the unconditional prediction. noise: strength of the noise that an inversion finds; pure noise has 1.
    loss: of a search. residual: share of the unconditional prediction's square that a fit does not predict, 1 - R^2.
    error: of what the denoised image should agree with, relative to that.
    """

    name: str
    kind: Kind


CFG_UPDATE = Quantity("CFG update", "update")
COSINE = Quantity("cosine of cond and uncond", "cosine")

Point = tuple[Quantity, int]  # and the step


@dataclass(frozen=True)
class PendingCopy:
    """A copy of values from a device, which goes on in the background."""

    points: Sequence[Point]
    values: Tensor
    done: torch.cuda.Event | None  # None: it is done

    @classmethod
    def begin(cls, points: Sequence[Point], values: Sequence[Tensor]) -> PendingCopy:
        """Only CUDA copies in the background; other devices are waited for."""
        stacked = torch.stack(list(values))
        if not stacked.is_cuda:
            return cls(points, stacked.cpu(), None)
        copy = stacked.to("cpu", non_blocking=True)
        return cls(points, copy, torch.cuda.current_stream(stacked.device).record_event())


@dataclass
class Curves:
    """values: what has been read. A quantity is there as soon as its first value is recorded."""

    values: dict[Quantity, dict[int, float]] = field(default_factory=dict)
    _waiting: dict[Point, Tensor] = field(default_factory=dict)
    _pending: list[PendingCopy] = field(default_factory=list)

    def record(self, quantity: Quantity, step: int, value: Tensor) -> None:
        """Keep a number []; it stays on its device."""
        self.values.setdefault(quantity, {})
        self._waiting[quantity, step] = value

    def collect_ready(self) -> None:
        """Read what a device has handed over, and ask it for the rest, without waiting for it."""
        self._collect(wait=False)
        if not self._pending:
            self._start()
            self._collect(wait=False)

    def read(self) -> None:
        """Read everything."""
        self._collect(wait=True)
        self._start()
        self._collect(wait=True)

    def _start(self) -> None:
        for device in {value.device for value in self._waiting.values()}:
            points = [point for point, value in self._waiting.items() if value.device == device]
            self._pending.append(PendingCopy.begin(points, [self._waiting[point] for point in points]))
        self._waiting.clear()

    def _collect(self, wait: bool) -> None:
        pending, self._pending = self._pending, []
        for copy in pending:
            if copy.done is not None and not copy.done.query():
                if not wait:
                    self._pending.append(copy)
                    continue
                copy.done.synchronize()
            for (quantity, step), value in zip(copy.points, copy.values.tolist(), strict=True):
                self.values[quantity][step] = value
