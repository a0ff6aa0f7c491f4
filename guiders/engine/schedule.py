"""Where an evaluation stands in the schedule of its sampling call."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor

_LOOPS = (("i", "sigmas"), ("step_index", "timesteps"))  # k-diffusion, UniPC


def window(model_sampling: Any, start_percent: float, end_percent: float) -> tuple[float, float]:
    """(sigma_start, sigma_end) of a share of the schedule. A rule covers sigma_end < sigma <= sigma_start."""
    return float(model_sampling.percent_to_sigma(start_percent)), float(model_sampling.percent_to_sigma(end_percent))


def solver_step(levels: int) -> int | None:
    """Index of the solver step that is asking for an evaluation, read off the sampler's own loop; None if it has no such loop.

    Nothing else tells the second stage of a Heun step from the first stage of the next one (same noise level), and comparing noise
    levels would have to wait for the GPU at every step.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        names = (*frame.f_code.co_varnames, *frame.f_code.co_cellvars)  # a variable that a comprehension reads is a cell
        for counter, schedule in _LOOPS:
            if counter in names and schedule in names:
                i, sigmas = frame.f_locals.get(counter), frame.f_locals.get(schedule)
                if isinstance(i, int) and isinstance(sigmas, Tensor) and len(sigmas) == levels and 0 <= i < levels - 1:
                    return i
        frame = frame.f_back
    return None


def nearest_step(sigmas: list[float], sigma: float) -> int:
    """The last step of the schedule that starts at or above ``sigma``."""
    return max((i for i, level in enumerate(sigmas[:-1]) if level >= sigma * (1 - 1e-4)), default=0)
