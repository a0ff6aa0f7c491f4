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

_CURVE = 1000  # steps in which a scheduler is read


def shift_abar(abar: float, rho: float, gamma: float) -> float:
    """VP: abar_F = k abar / (1 + (k - 1) abar), k = rho^(-gamma), abar = a^2 = 1 - s^2."""
    k = rho**-gamma
    return k * abar / (1 + (k - 1) * abar)


def shift_sigma(sigma: float, rho: float, gamma: float) -> float:
    """k-diffusion's x = z0 + sigma eps: sigma_F = sigma rho^(gamma / 2)."""
    return sigma * rho ** (gamma / 2)


def shift_time(t: float, rho: float, gamma: float) -> float:
    """Flow's x = (1 - t) z0 + t eps: odds t / (1 - t) times q = rho^(gamma / 2). The authors' SD3 code is gamma = 1.

    A model's own time shift multiplies the odds as well, so that both commute and t may be shifted already.
    """
    q = rho ** (gamma / 2)
    return q * t / (1 + (q - 1) * t)


def shift_level(model_sampling: Any, level: float, rho: float, gamma: float) -> float:
    """The level at which a stage begins, when the one before, rho times smaller, ended at ``level``; both as the host counts them."""
    return (shift_time if is_flow(model_sampling) else shift_sigma)(level, rho, gamma)


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
    first = 0.0 if start is None else _place(curve, start)
    if end > 0:
        last = _place(curve, end)
    else:
        last = len(curve) - 1
        lowest = _place(curve, float(_positive(whole)[-1])) if steps > 1 else 0.0  # not all schedulers know one step
        gap = (last - lowest) * steps / last  # what this scheduler leaves free before 0, in spacings
        last -= gap * (last - first) / steps
    levels = np.exp(np.interp(np.linspace(first, last, steps), np.arange(len(curve)), np.log(curve)))
    levels[0] = levels[0] if start is None else start
    levels[-1] = end or levels[-1]
    return torch.tensor([*levels, 0.0], dtype=torch.float32)


def _positive(sigmas: Tensor) -> np.ndarray:
    """The levels above 0 in float64, descending, each once."""
    levels = np.unique(sigmas[sigmas > 0].double().cpu().numpy())
    return levels[::-1]


def _place(curve: np.ndarray, level: float) -> float:
    """Where a level lies on a descending curve, as a fractional index."""
    return float(np.interp(-np.log(level), -np.log(curve), np.arange(len(curve))))
