"""Search for a guidance policy by gradient descent through the host's samplers. The loss and its paper are in relaxation.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..engine.attach import detach
from ..engine.curves import Quantity
from ..engine.host import leaves_out_forward_passes
from ..engine.plan import Rule
from ..engine.schedule import solver_step
from ..engine.telemetry import tracing
from ..learning.checkpoints import checkpointed, checkpointed_call
from ..learning.gradients import cloned, gradients, ordinary_weights, training_kernels
from ..learning.progress import Progress
from ..learning.recognition import setting_of
from ..learning.runs import Runs
from ..learning.samplers import differentiable
from .relaxation import discretise, distance, options, relax, temperature
from .weights_per_step import StepWeights, evaluations

NAME = "Guidance policy search"
LOSS = Quantity("loss", "loss")
LEARNING_RATE = 0.2


class GuidedModel:
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
            cond, uncond = checkpointed_call(self.predictions, x, sigma)
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
        self.function = differentiable(sampler, NAME)
        self.logits, self.weights, self.cost_weight = logits, weights, cost_weight
        self.loss = self.distance = self.expected = float("nan")

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, latent: Tensor, *_: Any) -> Tensor:
        """The CFG result. Called by the host's guider; a mask on the latent is not used."""
        model = model_wrap.inner_model
        sampling = model.model_sampling
        x = sampling.noise_scaling(sigmas[0], noise, latent, self.max_denoise(model_wrap, sigmas))

        def run(weights: Tensor) -> Tensor:
            guided = GuidedModel(model_wrap, extra_args["model_options"], weights, len(sigmas))
            extra = {"model_options": extra_args["model_options"], "seed": extra_args["seed"]}
            return self.function(guided, x, sigmas, extra_args=extra, callback=None, disable=True)

        with training_kernels(), ordinary_weights(model), checkpointed(model.diffusion_model):
            with torch.no_grad():
                target = run(x.new_full((len(sigmas) - 1,), model_wrap.cfg))
            logits = self.logits.to(x)
            weights, expected = relax(logits / self.temperature, self.weights)
            apart = distance(run(weights), target)
            loss = apart + self.cost_weight * expected
            loss.backward()
        self.loss, self.distance, self.expected = (float(value.detach()) for value in (loss, apart, expected))
        return sampling.inverse_noise_scaling(sigmas[-1], target)


def search(
    runs: Runs, iterations: int, cost_weight: float, node: str | None = None, write: Callable[[str], None] | None = None
) -> tuple[StepWeights, str]:  # fmt: skip
    """The policy found by Adam on the logits, one batch of fresh noise per iteration, and a table of how that went.

    node: that of the graph. write: gets a line of text now and then, which says how far it is.

    Raises ValueError as Runs.check and ``differentiable`` do, and where EasyCache is on the model.
    """
    runs.check(1, excluded=Rule)
    if leaves_out_forward_passes(runs.model.model_options):
        raise ValueError(f"{NAME} needs every forward pass, and EasyCache leaves some out; bypass EasyCache on its model.")
    differentiable(runs.sampler, NAME)
    runs = replace(runs, model=detach(runs.model))
    steps, weights = len(runs.sigmas) - 1, options(runs.cfg)
    progress = Progress(iterations, write)
    lines = [f"{'iteration':>9}{'loss':>10}{'distance':>10}{'expected NFE':>14}{'NFE':>5}"]
    with gradients(), tracing(node, LOSS, iterations, "iteration") as trace:
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
            nfe = sum(map(evaluations, found))
            if trace is not None:
                trace.add(number, sampler.loss, nfe=nfe, saved=2 * steps - nfe)
            if number % max(1, iterations // 10) == 0 or number == iterations - 1:
                expected = sampler.expected * 2 * steps
                lines.append(f"{number:>9}{sampler.loss:>10.4f}{sampler.distance:>10.4f}{expected:>14.1f}{nfe:>5}")
            progress.update(f"{number + 1} of {iterations} · loss {sampler.loss:.4f} · {nfe} of {2 * steps} evaluations")
        return StepWeights(setting_of(guider, runs.sampler, runs.sigmas), found), "\n".join(lines)
