"""Noise levels of a cascade: FreCaS's level shift between stages, and a stage's slice of a scheduler.

Zhang, Li, Zhang, ICLR 2025, arXiv 2410.18410, section 3 (read in the authors' scheduler_wrapper.py): larger pictures need more noise
for the same perceived corruption, SNR(F) = SNR(L) rho^(-gamma), for x = a z0 + s eps with SNR = a^2 / s^2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spaces import is_flow
from .stages import NAME, Stage

_CURVE = 1000  # steps in which a scheduler is read


# --- the maths -------------------------------------------------------------------------------------------------------


def shift_sigma(sigma: float, rho: float, gamma: float) -> float:
    """k-diffusion's x = z0 + sigma eps: sigma_F = sigma rho^(gamma / 2)."""
    return sigma * rho ** (gamma / 2)


def shift_time(t: float, rho: float, gamma: float) -> float:
    """Flow's x = (1 - t) z0 + t eps: odds t / (1 - t) times q = rho^(gamma / 2). The authors' SD3 code is gamma = 1.

    A model's own time shift multiplies the odds as well, so that both commute and t may be shifted already.
    """
    q = rho ** (gamma / 2)
    return q * t / (1 + (q - 1) * t)


def shift_level(level: float, rho: float, gamma: float, flow: bool) -> float:
    """The level at which a stage begins, when the one before, rho times smaller, ended at ``level``; both as the host counts them."""
    return (shift_time if flow else shift_sigma)(level, rho, gamma)


def slice_of(curve: np.ndarray, whole: np.ndarray, steps: int, start: float | None, end: float) -> np.ndarray:
    """``steps`` levels from ``start`` to ``end``, evenly spaced on a curve that falls from the scheduler's first level to its last.

    whole: what the scheduler makes of that many steps by itself. A stage that goes to the end of the schedule (end 0) leaves as much
    room before level 0 as that does. start None: where the curve begins.
    """
    first = 0.0 if start is None else index_of(curve, start)
    if end > 0:
        last = index_of(curve, end)
    else:
        last = len(curve) - 1
        lowest = index_of(curve, float(whole[-1])) if steps > 1 else 0.0  # not all schedulers know one step
        gap = (last - lowest) * steps / last  # what this scheduler leaves free before 0, in spacings
        last -= gap * (last - first) / steps
    levels = np.exp(np.interp(np.linspace(first, last, steps), np.arange(len(curve)), np.log(curve)))
    levels[0] = levels[0] if start is None else start
    levels[-1] = end or levels[-1]
    return levels


def index_of(curve: np.ndarray, level: float) -> float:
    """The fractional index of a level on a falling curve."""
    return float(np.interp(-np.log(level), -np.log(curve), np.arange(len(curve))))


# --- the host's schedulers -------------------------------------------------------------------------------------------


def stage_sigmas(model_sampling: Any, scheduler: str, steps: int, start: float | None = None, end: float = 0.0) -> Tensor:
    """The ``steps`` evaluated levels of a stage, then 0: float32 [steps + 1].

    start: the first level; None is where the scheduler begins. end: the last evaluated level; 0 is where the scheduler ends, as a last
    stage has it. Levels between are evenly spaced on the scheduler's curve (``normal``: in time, as the authors do). The whole range is
    the scheduler's own list, to the bit.
    """
    from comfy.samplers import calculate_sigmas  # here, so that the maths above needs no host

    whole = calculate_sigmas(model_sampling, scheduler, steps)
    if start is None and end == 0:
        return whole
    curve = _positive(calculate_sigmas(model_sampling, scheduler, _CURVE))
    return torch.tensor([*slice_of(curve, _positive(whole), steps, start, end), 0.0], dtype=torch.float32)


def _positive(sigmas: Tensor) -> np.ndarray:
    """The levels above 0 in float64, descending, each once."""
    levels = np.unique(sigmas[sigmas > 0].double().cpu().numpy())
    return levels[::-1]


def first_sigmas(model: Any, scheduler: str, stage: Stage) -> Tensor:
    """The levels of a first stage."""
    sampling = model.get_model_object("model_sampling")
    if stage.end >= float(sampling.sigma_max):
        raise ValueError(
            f"{NAME}: the first stage cannot end at {stage.end:.4g}; the model's highest noise level is {float(sampling.sigma_max):.4g}."
        )
    return stage_sigmas(sampling, scheduler, stage.steps, end=stage.end)


def next_sigmas(model: Any, scheduler: str, before: Tensor, rho: float, gamma: float, stage: Stage) -> Tensor:
    """The levels of a stage after one that was sampled with ``before``, whose last evaluated level is the last but one.

    rho: ratio of the sides. Raises ValueError where level and gamma leave the stage no room.
    """
    sampling = model.get_model_object("model_sampling")
    size, level, top = f"{stage.width}x{stage.height}", float(before[-2]), float(sampling.sigma_max)
    start = shift_level(level, rho, gamma, is_flow(sampling))
    if start >= top:
        raise ValueError(
            f"{NAME}: the stage before {size} ends at {level:.4g}, which gamma {gamma:g} shifts to {start:.4g}, not below the model's "
            f"highest noise level {top:.4g}; let it end lower."
        )
    if stage.end >= start:
        raise ValueError(f"{NAME}: the stage {size} begins at {start:.4g} and cannot end at {stage.end:.4g}; let it end lower.")
    return stage_sigmas(sampling, scheduler, stage.steps, start, stage.end)
