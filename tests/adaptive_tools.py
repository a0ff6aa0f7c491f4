"""Runs of Adaptive Guidance on tiny models, thresholds that make it switch, and the rule written without the engine."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import tools
import torch
from tools import comfy, cond, empty_latent, guided, log_of

from lodestar.guiders.policies.adaptive import AdaptiveGuidance

STEPS = 6
CFG = 4.0


def ag(threshold, **more):
    return AdaptiveGuidance(threshold=threshold, **more)


def noise_for(model, batch=1):
    """Rows of different sizes, so that they switch at different steps."""
    noise = torch.randn(empty_latent(model, batch, 8).shape, generator=torch.Generator().manual_seed(3))
    return noise * torch.linspace(1, 1.6, batch).reshape(-1, 1, 1, 1)


def run(model, noise=None, cfg=CFG, sampler="euler", **more):
    noise = noise_for(model) if noise is None else noise
    more = {"positive": cond(1), "negative": cond(2), "seed": 1} | more
    positive, negative = more.pop("positive"), more.pop("negative")
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, STEPS, cfg, sampler, "normal", positive, negative, torch.zeros_like(noise), disable_pbar=True, **more
        )


def gammas(model, noise=None, space="denoised", sampler="euler", rules=(), **more):
    """gamma at every step of a CFG run of one sample."""
    main = guided(model, *rules, ag(1.0, space=space))
    run(main, noise, sampler=sampler, **more)
    curve = log_of(main).curves[ag(1.0, space=space).curve]
    return [curve[i] for i in sorted(curve)]


def between(curve, step):
    """A threshold that is first reached at this step."""
    before, here = max(curve[:step], default=-1.0), curve[step]
    assert here > before + 1e-6, curve
    return (before + here) / 2


def met(curve, threshold):
    return next((i for i, value in enumerate(curve) if value >= threshold), None)


def spread(curves):
    """A threshold that the samples reach at different steps."""
    candidates = sorted((p + q) / 2 for curve in curves for p, q in itertools.pairwise(curve))
    best = max(candidates, key=lambda t: len({met(curve, t) for curve in curves} - {None, STEPS - 1}))
    assert len({met(curve, best) for curve in curves}) > 1
    return best


def without_the_engine(model, threshold, space="denoised", same_step=False, stages=1, rules=()):
    """A clone on which a post-CFG function applies the rule, by float64 cosines of torch; D_u is always evaluated."""
    clone = tools.reference(model, *rules)
    state = SimpleNamespace(switched=None, decided=None, evaluations=0)

    def vectors(args):
        x, sigma = args["input"].double(), args["sigma"].double().reshape(-1, 1, 1, 1)
        for d in (args["cond_denoised"].double(), args["uncond_denoised"].double()):
            if isinstance(model.model.model_sampling, comfy.model_sampling.CONST):
                eps = (x - (1 - sigma) * d) / sigma
                v = eps - d
            else:
                eps = (x - d) / sigma
                v = (eps - sigma * d) / (1 + sigma**2) ** 0.5
            yield {"denoised": d, "noise": eps, "velocity": v}[space].flatten(1)

    def post_cfg(args):
        first, state.evaluations = state.evaluations % stages == 0, state.evaluations + 1
        if state.switched is None:
            state.switched = state.decided = torch.zeros(len(args["input"]), dtype=torch.bool)
        if first:
            state.decided = state.switched
            state.switched = state.switched | (torch.cosine_similarity(*vectors(args), dim=1) >= threshold)
            if same_step:
                state.decided = state.switched
        return torch.where(state.decided.reshape(-1, 1, 1, 1), args["cond_denoised"], args["denoised"])

    clone.set_model_sampler_post_cfg_function(post_cfg)
    return clone


def cfg_until(model, step):
    """A clone whose guider is set to cfg 1 from a step on, as other packs do it."""
    evaluations = itertools.count()

    def predict_noise(executor, *args, **more):
        if next(evaluations) == step:
            executor.class_obj.cfg = 1.0
        return executor(*args, **more)

    return tools.with_wrapper(model, "predict_noise", predict_noise)
