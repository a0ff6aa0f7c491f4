"""CFG++. Chung et al., ICLR 2025, arXiv 2406.08070, from the authors' code, on any Gaussian path x = a x0 + s noise.

The clean estimate is guided, D_lambda = D_u + lambda (D_c - D_u), and the noise that carries it to the next level is the unconditional one.
So every solver is its own unconditional step plus a' (D_lambda - D_u): exactly one term, of weight 1, sees the condition.

Solvers call ``predict(x, sigma, i) -> (D_lambda, D_u)``; i is the number of the step at its first evaluation, None at a second one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import mean
from typing import NamedTuple

from torch import Tensor

from ..spaces import Level, level_at

Predict = Callable[[Tensor, Tensor, "int | None"], tuple[Tensor, Tensor]]


def decay(now: Level, then: Level) -> float:
    """e^-h = rho' / rho, with h the step in log(a / s). 0 from pure noise, and to the clean image."""
    return then.s * now.a / (then.a * now.s)


def step_size(now: Level, then: Level) -> float:
    """h = log(a'/s') - log(a/s)."""
    return -math.log(decay(now, then)) if decay(now, then) > 0 else math.inf


def ddim(x: Tensor, denoised: Tensor, now: Level, then: Level) -> Tensor:
    """a' D + s' eps with eps = (x - a D) / s: [B, ...] -> [B, ...]."""
    return then.a * denoised + then.s / now.s * (x - now.a * denoised)


def cfgpp_step(x: Tensor, guided: Tensor, uncond: Tensor, now: Level, then: Level) -> Tensor:
    """a' D_lambda + s' eps_u, which is DDIM with D_u plus a' (D_lambda - D_u): [B, ...] -> [B, ...]."""
    return then.a * guided if then.s == 0 else ddim(x, uncond, now, then) + then.a * (guided - uncond)


def equivalent_cfg(lambda_: float, now: Level, then: Level) -> float:
    """The w of which the same step of plain CFG is the same step: lambda a' s / (a' s - s' a)."""
    kept = decay(now, then)
    return lambda_ / (1 - kept) if kept < 1 else math.inf


def mean_equivalent_cfg(lambda_: float, levels: Sequence[Level]) -> float:
    """Its mean over the steps of a schedule, the cfg that looks as strong.

    50 steps of Stable Diffusion have 11.7 lambda; the authors, matching by LPIPS, found 10 to 12.5 (lambda 0.2 with cfg 2, 0.4 with 5,
    0.6 with 7.5, 0.8 with 9, 1 with 12.5).
    """
    return mean(equivalent_cfg(lambda_, now, then) for now, then in pairwise(levels))


# --- the noise of the next level: s'^2 = s_down^2 + s_up^2 -----------------------------------------------------------


def no_noise(now: Level, then: Level, eta: float) -> tuple[float, float]:
    """(s', 0)."""
    return then.s, 0.0


def ancestral(now: Level, then: Level, eta: float) -> tuple[float, float]:
    """(s_down, s_up) of k-diffusion's ancestral step, in rho = s / a. From pure noise its limit: s_up = eta s'."""
    up = eta * then.s * math.sqrt(max(0.0, 1 - decay(now, then) ** 2))
    return math.sqrt(then.s**2 - up**2), up


def reverse_sde(now: Level, then: Level, eta: float) -> tuple[float, float]:
    """(s_down, s_up) of SDE-DPM-Solver++ (Lu et al., arXiv 2211.01095) with the host's eta: s' e^(-eta h), s' sqrt(1 - e^(-2 eta h))."""
    share = decay(now, then) ** eta
    return then.s * share, then.s * math.sqrt(1 - share**2)


# --- solvers ---------------------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """What a solver goes along: the schedule as a tensor [n + 1] and as levels, the numbers of its steps, the noise that each may add."""

    sigmas: Tensor
    levels: Sequence[Level]
    steps: Iterable[int]
    split: Callable[[Level, Level], tuple[float, float]]  # (s_down, s_up)
    noise: Callable[[Tensor, Tensor], Tensor]
    history: str = "unconditional"


def euler(predict: Predict, x: Tensor, schedule: Schedule) -> Tensor:
    """DDIM; Euler ancestral with noise."""
    sigmas, levels = schedule.sigmas, schedule.levels
    for i in schedule.steps:
        down, up = schedule.split(levels[i], levels[i + 1])
        guided, uncond = predict(x, sigmas[i], i)
        x = cfgpp_step(x, guided, uncond, levels[i], Level(levels[i + 1].a, down))
        x = _noised(x, up, schedule, i)
    return x


def dpmpp_2m(predict: Predict, x: Tensor, schedule: Schedule) -> Tensor:
    """DPM-Solver++(2M), and its SDE form with noise: the base step has D_u + h / (2 h_last) (D - D_u of the last step) in place of D_u.

    D is D_u, by the paper's rule; with history "guided" it is D_lambda, as in ComfyUI and the authors' SD1.5 file.
    """
    sigmas, levels = schedule.sigmas, schedule.levels
    last, h_last = None, math.inf
    for i in schedule.steps:
        down, up = schedule.split(levels[i], levels[i + 1])
        h = step_size(levels[i], levels[i + 1])
        guided, uncond = predict(x, sigmas[i], i)
        curve = 0.0
        if last is not None and levels[i + 1].s > 0:
            curve = h / (2 * h_last) * ((guided if schedule.history == "guided" else uncond) - last)
        x = cfgpp_step(x, guided + curve, uncond + curve, levels[i], Level(levels[i + 1].a, down))
        x = _noised(x, up, schedule, i)
        last, h_last = uncond, h
    return x


def dpmpp_2s(predict: Predict, x: Tensor, schedule: Schedule) -> Tensor:
    """DPM-Solver++(2S): D_u leads to the middle of the step in log(a / s), and the predictions there make the step.

    From pure noise there is no such middle (h is infinite): that step, and one that ends without noise, is Euler's.
    """
    sigmas, levels = schedule.sigmas, schedule.levels
    flow = levels[0].a < 1
    for i in schedule.steps:
        now, then = levels[i], levels[i + 1]
        down, up = schedule.split(now, then)
        guided, uncond = predict(x, sigmas[i], i)
        if now.a > 0 and down > 0:
            middle = level_at(math.sqrt(now.s / now.a * down / then.a), flow)
            guided, uncond = predict(ddim(x, uncond, now, middle), sigmas.new_tensor(middle.s), None)
        x = cfgpp_step(x, guided, uncond, now, Level(then.a, down))
        x = _noised(x, up, schedule, i)
    return x


def _noised(x: Tensor, up: float, schedule: Schedule, i: int) -> Tensor:
    return x + up * schedule.noise(schedule.sigmas[i], schedule.sigmas[i + 1]) if up > 0 else x


class Solver(NamedTuple):
    """A solver and how it divides the noise of the next level."""

    run: Callable[[Predict, Tensor, Schedule], Tensor]
    split: Callable[[Level, Level, float], tuple[float, float]]


SOLVERS = {
    "euler": Solver(euler, no_noise),
    "euler_ancestral": Solver(euler, ancestral),
    "dpmpp_2m": Solver(dpmpp_2m, no_noise),
    "dpmpp_2s_ancestral": Solver(dpmpp_2s, ancestral),
    "dpmpp_2m_sde": Solver(dpmpp_2m, reverse_sde),
}
HISTORIES = ("unconditional", "guided")
