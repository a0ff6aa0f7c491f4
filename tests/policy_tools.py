"""What a policy search samples from tiny models, policies with given weights, and the run that they are for."""

from __future__ import annotations

import tools

from lodestar.guiders.learning.recognition import setting_of
from lodestar.guiders.learning.runs import Runs
from lodestar.guiders.policies.weights_per_step import StepWeights, StepwiseCFG

STEPS, CFG = 4, 6.0


def runs(model, **changes):
    """What a search samples: one or two rows of a tiny model."""
    sigmas = tools.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", changes.pop("steps", STEPS))
    latent = {"samples": tools.empty_latent(model, batch=changes.pop("batch", 1), size=8)}
    sampler = tools.comfy.samplers.sampler_object(changes.pop("sampler", "euler"))
    settings = {
        "positive": [tools.cond(1)], "negative": tools.cond(2), "latent": latent, "sampler": sampler, "sigmas": sigmas,
        "cfg": CFG, "seed": 5,
    }  # fmt: skip
    return Runs(name="Guidance policy search", model=model, **settings | changes)


def policy_for(model, weights, **changes):
    """A policy with these weights for the run that ``sample`` does."""
    these = runs(model, steps=len(weights), **changes)
    setting = setting_of(these.guider(0, model), these.sampler, these.sigmas)
    return StepWeights(setting, tuple(weights))


def applied(model, policy):
    """The model with the policy."""
    return tools.guided(model, StepwiseCFG(policy=policy))


def sample(model, **more):
    """The run that the policies are for."""
    return tools.sample(model, **{"steps": STEPS, "cfg": CFG, "sampler": "euler", "scheduler": "normal", **more})
