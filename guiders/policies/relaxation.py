"""The relaxation behind the search for a guidance policy. Castillo et al., AAAI 2025, arXiv 2312.12487, section 3. Without the host.

At each step t one of several options is to be chosen: the unconditional prediction, the conditional one, or CFG at some weight. All are
D_u + w (D_c - D_u) with weights w_j of 0, 1 and the strengths; they cost n_j evaluations. With logits alpha_t and p_t = softmax(alpha_t),

    D_t = sum_j p_tj (D_u + w_j (D_c - D_u)) = D_u + (sum_j p_tj w_j) (D_c - D_u)
    loss = ||x(alpha) - x_cfg||^2 / ||x_cfg||^2 + cost_weight sum_t sum_j p_tj n_j / 2T

from the same noise, and the argmax of every alpha_t is the policy. The strengths s/2, s, 2s, the distance and the weight of the cost are
not known from the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .weights_per_step import COND, UNCOND, evaluations


def options(cfg: float) -> tuple[float, ...]:
    """The weights w_j to choose from: D_u alone, D_c alone, CFG at s/2, s and 2s."""
    return tuple(dict.fromkeys((UNCOND, COND, cfg / 2, cfg, 2 * cfg)))


def relax(logits: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Expected weight [T] of every step, and the expected evaluations as a share of CFG's 2T, for logits [T, options]."""
    chances = logits.softmax(dim=1)
    table = chances.new_tensor([(weight, evaluations(weight)) for weight in weights])
    expected = chances @ table
    return expected[:, 0], expected[:, 1].sum() / (2 * len(logits))


def distance(x: Tensor, target: Tensor) -> Tensor:
    """||x - target||^2 / ||target||^2, mean over the batch, [B, ...]."""
    return ((x - target).square().flatten(1).sum(1) / target.square().flatten(1).sum(1)).mean()


def temperature(number: int, iterations: int) -> float:
    """From 1 to 0.1: a mixture of D_c and CFG at 2s does what CFG at s does and costs less, until chances have to become decisions."""
    return 0.1 ** (number / max(1, iterations - 1))


def discretise(logits: Tensor, weights: Sequence[float]) -> tuple[float, ...]:
    """The weight of the likeliest option of every step."""
    return tuple(weights[index] for index in logits.argmax(dim=1).tolist())
