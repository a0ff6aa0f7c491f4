"""Search for a guidance policy by gradient descent. Castillo et al., AAAI 2025, arXiv 2312.12487, section 3.

At each step t one of several options is to be chosen: the unconditional prediction, the conditional one, or CFG at some weight. All are
D_u + w (D_c - D_u) with weights w_j of 0, 1 and the strengths; they cost n_j evaluations. With logits alpha_t and p_t = softmax(alpha_t),

    D_t = sum_j p_tj (D_u + w_j (D_c - D_u)) = D_u + (sum_j p_tj w_j) (D_c - D_u)
    loss = ||x(alpha) - x_cfg||^2 / ||x_cfg||^2 + cost_weight sum_t sum_j p_tj n_j / 2T

from the same noise, and the argmax of every alpha_t is the policy. The strengths s/2, s, 2s, the distance and the weight of the cost are
not known from the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from .differentiable import checkpointed, differentiable, once_more, ordinary_weights
from .run import solver_step

LEARNING_RATE = 0.1
UNCOND, COND = 0.0, 1.0


def options(cfg: float) -> tuple[float, ...]:
    """The weights w_j to choose from: D_u alone, D_c alone, CFG at s/2, s and 2s."""
    return tuple(dict.fromkeys((UNCOND, COND, cfg / 2, cfg, 2 * cfg)))


def evaluations(weight: float) -> int:
    """n_j: what an option costs."""
    return 1 if weight in (UNCOND, COND) else 2


def relax(logits: Tensor, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Expected weight [T] of every step, and the expected evaluations as a share of CFG's 2T, for logits [T, options]."""
    chances = logits.softmax(dim=1)
    table = chances.new_tensor([(weight, evaluations(weight)) for weight in weights])
    expected = chances @ table
    return expected[:, 0], expected[:, 1].sum() / (2 * len(logits))


def distance(x: Tensor, target: Tensor) -> Tensor:
    """||x - target||^2 / ||target||^2, mean over the batch, [B, ...]."""
    return ((x - target).square().flatten(1).sum(1) / target.square().flatten(1).sum(1)).mean()


def discretise(logits: Tensor, weights: Sequence[float]) -> tuple[float, ...]:
    """The weight of the likeliest option of every step."""
    return tuple(weights[index] for index in logits.argmax(dim=1).tolist())


class GuidedBy:
    """The host's model as its samplers call it, guided with a weight of its own at every step."""

    def __init__(self, guider: Any, options: dict[str, Any], weights: Tensor, levels: int) -> None:
        self.inner_model = guider
        self.options = options
        self.weights = weights
        self.levels = levels

    def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        """D_u + w_t (D_c - D_u) at x [B, ...], sigma [B]."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        weight = self.weights[solver_step(self.levels)]
        if not torch.is_grad_enabled():
            cond, uncond = self.predictions(x, sigma)
        else:
            cond, uncond = once_more(self.predictions, x, sigma)
        return uncond + weight * (cond - uncond)

    def predictions(self, x: Tensor, sigma: Tensor) -> list[Tensor]:
        """D_c and D_u [B, ...], in one call of the host."""
        conds = self.inner_model.conds
        return comfy.samplers.calc_cond_batch(self.inner_model.inner_model, [conds["positive"], conds["negative"]], x, sigma, self.options)


class SearchSampler(comfy.samplers.Sampler):
    """A SAMPLER that samples with CFG and then with relaxed guidance from the same noise, and leaves the gradient of the loss in the logits.

    loss and expected (share of CFG's evaluations) are those of the last run.
    """

    def __init__(self, sampler: Any, logits: Tensor, weights: Sequence[float], cost_weight: float) -> None:
        self.function = differentiable(sampler)
        self.logits, self.weights, self.cost_weight = logits, weights, cost_weight
        self.loss = self.distance = self.expected = float("nan")

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Callable | None, noise: Tensor, latent_image: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """The CFG result; called by the host's guider."""
        sampling = model_wrap.inner_model.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, self.max_denoise(model_wrap, sigmas))

        def run(weights: Tensor) -> Tensor:
            guided = GuidedBy(model_wrap, extra_args["model_options"], weights, len(sigmas))
            extra = {"model_options": extra_args["model_options"], "seed": extra_args["seed"]}
            return self.function(guided, x, sigmas, extra_args=extra, callback=None, disable=True)

        with ordinary_weights(model_wrap.inner_model), checkpointed(model_wrap.inner_model.diffusion_model):
            with torch.no_grad():
                target = run(x.new_full((len(sigmas) - 1,), model_wrap.cfg))
            logits = self.logits.to(x)
            weights, expected = relax(logits, self.weights)
            far = distance(run(weights), target)
            loss = far + self.cost_weight * expected
            loss.backward()
        self.loss, self.distance, self.expected = (float(value.detach()) for value in (loss, far, expected))
        return sampling.inverse_noise_scaling(sigmas[-1], target)
