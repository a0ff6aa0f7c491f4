"""Where an evaluation stands in the schedule of its sampling call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

# The names of the counter and the schedule in a sampler's loop, and how many levels the sampler may have inserted into its schedule.
_LOOPS = (("i", "sigmas", 0), ("step_index", "timesteps", 0), ("step", "sigmas", 1))  # k-diffusion, UniPC, RES4LYF


def call_sampler(sampler: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a sampler. Its loop is looked for from an evaluation up to here, and not in the frames of those who call it."""
    return sampler(*args, **kwargs)


def window(model_sampling: Any, start_percent: float, end_percent: float) -> tuple[float, float]:
    """(sigma_start, sigma_end) of a share of the schedule. A rule covers sigma_end < sigma <= sigma_start."""
    return float(model_sampling.percent_to_sigma(start_percent)), float(model_sampling.percent_to_sigma(end_percent))


def solver_step(levels: int) -> int | None:
    """Index of the solver step that is asking for an evaluation, read off the sampler's own loop; None if it has no such loop.

    Nothing else tells the second stage of a Heun step from the first stage of the next one (same noise level), and comparing noise
    levels would have to wait for the GPU at every step.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not call_sampler.__code__:
        names = (*frame.f_code.co_varnames, *frame.f_code.co_cellvars)  # a variable that a comprehension reads is a cell
        for counter, schedule, inserted in _LOOPS:
            if counter in names and schedule in names:
                i, sigmas = frame.f_locals.get(counter), frame.f_locals.get(schedule)
                if isinstance(i, int) and isinstance(sigmas, Tensor) and 0 <= len(sigmas) - levels <= inserted and 0 <= i < len(sigmas) - 1:
                    return min(i, levels - 2)
        frame = frame.f_back
    return None


def nearest_step(sigmas: Sequence[float], sigma: float) -> int:
    """The last step of the schedule that starts at or above ``sigma``."""
    return max((i for i, level in enumerate(sigmas[:-1]) if level >= sigma * (1 - 1e-4)), default=0)


class Position:
    """Which solver step of a sampling call asks for the next evaluation, and whether that is the first one of its step.

    The pack's own samplers say which step they begin. For others it is read off their loop, and where they have none that can be read,
    off the noise level.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = sigmas
        self.last_index = -1  # the highest so far
        self._index = -1
        self._begun: int | None = None  # the step that a sampler of ours is in
        self._fresh = False  # whether it has just begun that step

    @property
    def begun(self) -> bool:
        """Whether there has been an evaluation."""
        return self._index >= 0

    @contextmanager
    def announced(self) -> Iterator[Callable[[int], None]]:
        """Around the loop of a sampler of ours: what it calls with the index of each step that it begins, in any order."""
        try:
            yield self._begin
        finally:
            self._begun = None

    def _begin(self, index: int) -> None:
        self._begun, self._fresh = index, True

    def advance(self, sigma: Tensor, restart: Callable[[], None]) -> tuple[int, bool]:
        """The index of the step that asks for an evaluation at sigma [B], and whether this is its first one.

        restart: called where a sampler's loop starts again, on the next part of a video.
        """
        if self._begun is not None:
            self._index, first, self._fresh = self._begun, self._fresh, False
            self.last_index = max(self._index, self.last_index)
            return self._index, first
        index = solver_step(len(self.sigmas))
        if index is None:
            index = nearest_step(self.sigmas, float(sigma.max()))
        elif index < self._index:
            self.last_index = -1
            restart()
        first = index > self.last_index
        self._index, self.last_index = index, max(index, self.last_index)
        return index, first
