"""Optimizer of the 128-pixel demo models: Muon (Jordan et al. 2024) for matrices and kernels. Needs torch alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch

_MOMENTUM = 0.95
_DECAY = 0.03  # of the weights, times the rate: without it kernels grow until a run diverges
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz step


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values between 0.7 and 1.2, in five Newton-Schulz steps."""
    a, b, c = _COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal: every direction of a matrix moves alike. A kernel counts as matrix [out, rest]."""

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - _MOMENTUM)
                direction = parameter.grad.lerp(momentum, _MOMENTUM).flatten(1)
                scale = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
                parameter.mul_(1 - _DECAY * group["lr"])
                parameter.add_(orthogonal(direction).view(parameter.shape), alpha=-group["lr"] * scale)
