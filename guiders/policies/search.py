"""Search for a guidance policy by gradient descent. Castillo et al., AAAI 2025, arXiv 2312.12487, section 3.

At each step t one of several options is to be chosen: the unconditional prediction, the conditional one, or CFG at some weight. All are
D_u + w (D_c - D_u) with weights w_j of 0, 1 and the strengths; they cost n_j evaluations. With logits alpha_t and p_t = softmax(alpha_t),

    D_t = sum_j p_tj (D_u + w_j (D_c - D_u)) = D_u + (sum_j p_tj w_j) (D_c - D_u)
    loss = ||x(alpha) - x_cfg||^2 / ||x_cfg||^2 + cost_weight sum_t sum_j p_tj n_j / 2T

from the same noise, and the argmax of every alpha_t is the policy. The strengths s/2, s, 2s, the distance and the weight of the cost are
not known from the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..engine.attach import detach
from ..engine.plan import Rule
from ..engine.schedule import solver_step
from ..learning.gradients import checkpointed, cloned, differentiable, gradients, once_more, ordinary_weights
from ..learning.runs import Runs
from ..learning.setting import Setting
from .weights_per_step import COND, UNCOND, GuidancePolicy, evaluations

NAME = "Guidance policy search"
LEARNING_RATE = 0.2


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
    """A SAMPLER that samples with CFG, then with relaxed guidance from the same noise, and leaves the loss's gradient in the logits.

    loss, distance and expected (share of CFG's evaluations) are those of the last run.
    """

    temperature = 1.0

    def __init__(self, sampler: Any, logits: Tensor, weights: Sequence[float], cost_weight: float) -> None:
        self.function = differentiable(sampler)
        self.logits, self.weights, self.cost_weight = logits, weights, cost_weight
        self.loss = self.distance = self.expected = float("nan")

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, latent: Tensor, *_: Any) -> Tensor:
        """The CFG result. Called by the host's guider; a mask on the latent is not used."""
        sampling = model_wrap.inner_model.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, latent, self.max_denoise(model_wrap, sigmas))

        def run(weights: Tensor) -> Tensor:
            guided = GuidedBy(model_wrap, extra_args["model_options"], weights, len(sigmas))
            extra = {"model_options": extra_args["model_options"], "seed": extra_args["seed"]}
            return self.function(guided, x, sigmas, extra_args=extra, callback=None, disable=True)

        with ordinary_weights(model_wrap.inner_model), checkpointed(model_wrap.inner_model.diffusion_model):
            with torch.no_grad():
                target = run(x.new_full((len(sigmas) - 1,), model_wrap.cfg))
            logits = self.logits.to(x)
            weights, expected = relax(logits / self.temperature, self.weights)
            far = distance(run(weights), target)
            loss = far + self.cost_weight * expected
            loss.backward()
        self.loss, self.distance, self.expected = (float(value.detach()) for value in (loss, far, expected))
        return sampling.inverse_noise_scaling(sigmas[-1], target)


def search(runs: Runs, iterations: int, cost_weight: float) -> tuple[GuidancePolicy, str]:
    """The policy found by Adam on the logits, one batch of fresh noise per iteration, and a table of how that went.

    Raises ValueError as Runs.check and ``differentiable`` do.
    """
    runs.check(1, alone=Rule)
    differentiable(runs.sampler)
    runs = replace(runs, model=detach(runs.model))
    steps, weights = len(runs.sigmas) - 1, options(runs.cfg)
    progress = comfy.utils.ProgressBar(iterations)
    lines = [f"{'iteration':>9}{'loss':>10}{'distance':>10}{'expected NFE':>14}{'NFE':>5}"]
    with gradients():
        inputs = ("positive", "negative", "sigmas", "latent")
        runs = replace(runs, **{name: cloned(getattr(runs, name)) for name in inputs})
        logits = torch.zeros(steps, len(weights), requires_grad=True)
        adam = torch.optim.Adam([logits], lr=LEARNING_RATE)
        sampler = SearchSampler(runs.sampler, logits, weights, cost_weight)
        for number in range(iterations):
            guider = runs.guider(number, runs.model)
            sampler.temperature = temperature(number, iterations)
            adam.zero_grad()
            runs.sample(guider, number, sampler)
            adam.step()
            found = discretise(logits, weights)
            if number % max(1, iterations // 10) == 0 or number == iterations - 1:
                expected, nfe = sampler.expected * 2 * steps, sum(map(evaluations, found))
                lines.append(f"{number:>9}{sampler.loss:>10.4f}{sampler.distance:>10.4f}{expected:>14.1f}{nfe:>5}")
            progress.update(1)
        return GuidancePolicy(Setting.of(guider, runs.sampler, runs.sigmas), found), "\n".join(lines)
