"""LinearAG's regression. Castillo et al., AAAI 2025, arXiv 2312.12487, section 5. Pure maths, without the host.

With the network's own predictions (scores) c_i, u_i of steps i = 0..T-1, a replaced step k uses

    u_hat_k = sum_{i<=k} beta^c_{k,i} c_i + sum_{i<k} beta^u_{k,i} u_i

with scalar coefficients for all pixels, prompts and seeds. The form is a reconstruction from secondary sources; no constant is added.
Scores are d = (x - D) / sigma: the noise for eps and v models, the velocity for flow models (k-diffusion's ``to_d``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

import torch
from torch import Tensor

RIDGE = 1e-8  # of the mean squared regressor: the regressors are almost collinear


def replaced_steps(steps: int) -> tuple[int, ...]:
    """Every second step of the first half (section 5 of the paper, T = 20: 1, 3, 5, 7, 9)."""
    return tuple(range(1, steps // 2, 2))


def score(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """d = (x - D) / sigma for x, D [B, ...] and sigma [B]."""
    return (x - denoised) / sigma.reshape(-1, *[1] * (x.ndim - 1))


def denoised(x: Tensor, score: Tensor, sigma: Tensor) -> Tensor:
    """D = x - sigma d, the inverse of ``score``."""
    return x - score * sigma.reshape(-1, *[1] * (x.ndim - 1))


class Gram:
    """Inner products of c_0..c_{T-1}, u_0..u_{T-1}, summed over trajectories: all that the regression needs, [2T, 2T] in float64.

    chunk: elements of a prediction that are in float64 at a time.
    """

    def __init__(self, steps: int, chunk: int = 1 << 18) -> None:
        self.steps, self.chunk = steps, chunk
        self.matrix = torch.zeros(2 * steps, 2 * steps, dtype=torch.float64)
        self.trajectories = 0

    def add(self, cond: Sequence[Tensor], uncond: Sequence[Tensor]) -> None:
        """Add the trajectories of one batch: T scores each, [B, ...]. Raises ValueError when steps are missing."""
        if len(cond) != self.steps or len(uncond) != self.steps:
            raise ValueError(f"a trajectory has {self.steps} predictions of each kind, not {len(cond)} and {len(uncond)}")
        rows = [prediction.detach().flatten().cpu() for prediction in (*cond, *uncond)]
        for parts in zip(*(row.split(self.chunk) for row in rows), strict=True):
            part = torch.stack(parts).double()
            self.matrix += part @ part.T
        self.trajectories += len(cond[0])

    def regressors(self, k: int) -> list[int]:
        """Rows of the matrix that step k is regressed on: c_0..c_k, u_0..u_{k-1}."""
        return [*range(k + 1), *range(self.steps, self.steps + k)]

    def solve(self, k: int, ridge: float = RIDGE) -> Tensor:
        """beta_k [2k + 1]: least squares with ``ridge`` times the mean squared regressor on the diagonal."""
        index = self.regressors(k)
        products = self.matrix[index][:, index]
        damping = ridge * products.diagonal().mean() * torch.eye(len(index), dtype=torch.float64)
        return torch.linalg.solve(products + damping, self.matrix[index, self.steps + k])

    def r2(self, k: int, beta: Tensor) -> float:
        """1 - sum (u_k - u_hat_k)^2 / sum u_k^2 over the trajectories, for coefficients [2k + 1] on ``regressors(k)``."""
        index, target = self.regressors(k), self.steps + k
        total = self.matrix[target, target]
        error = total - 2 * beta @ self.matrix[index, target] + beta @ self.matrix[index][:, index] @ beta
        return float(1 - error / total)

    def residual(self) -> float:
        """1 - R^2, mean over the replaced steps, of the coefficients that the trajectories so far lead to."""
        if not torch.isfinite(self.matrix).all():
            return math.nan
        return mean(1 - self.r2(k, self.solve(k)) for k in replaced_steps(self.steps))


def previous(k: int) -> Tensor:
    """The trivial predictor u_hat_k = u_{k-1} as coefficients [2k + 1]."""
    return torch.eye(2 * k + 1, dtype=torch.float64)[2 * k]


def shifted(k: int) -> Tensor:
    """The trivial predictor u_hat_k = c_k + u_{k-1} - c_{k-1} as coefficients [2k + 1]."""
    unit = torch.eye(2 * k + 1, dtype=torch.float64)
    return unit[k] + unit[2 * k] - unit[k - 1]


def predict(beta: Tensor, cond: Sequence[Tensor], uncond: Sequence[Tensor]) -> Tensor:
    """u_hat_k for beta [2k + 1] and the scores c_0..c_k, u_0..u_{k-1}, each [B, ...]."""
    total = torch.zeros_like(cond[-1])
    for weight, prediction in zip(beta.tolist(), (*cond, *uncond), strict=True):
        total.add_(prediction, alpha=weight)
    return total
