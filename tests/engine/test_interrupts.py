"""Runs of every kind that end in the middle, because the user cancels them or memory is short: nothing is left behind."""

from __future__ import annotations

import contextlib
import gc

import frecas_tools
import policy_tools
import pytest
import tools
import torch
from adaptive_tools import ag
from tools import comfy, cond, guided, pag, tiny

from lodestar.guiders.cfgpp.inversion import invert
from lodestar.guiders.cfgpp.sampler import cfgpp_sampler
from lodestar.guiders.comparison import Comparison, NamedModel
from lodestar.guiders.engine.keys import LODESTAR, PLAN
from lodestar.guiders.engine.run import Run
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.policies.linear_ag.fit import fit
from lodestar.guiders.policies.search import search
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance

SMALL = {"channel_mult": (1,), "num_res_blocks": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1]}
ERRORS = [comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError]


def small(seed=0):
    return tiny("unet", seed, **SMALL)


def latent():
    """A picture to begin with."""
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def schedule(model, steps=4):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


def plain():
    model = small()
    weak = Autoguidance(weak_model=small(seed=7), scale=1.5)
    main = guided(model, APG(norm_threshold=2.0), pag(model), weak, GuidanceInterval(start_percent=0.1), ag(0.9))
    return main, lambda: tools.sample(main, steps=4, latent=tools.empty_latent(model, 2, 8))


def fitting():
    model = small()

    def run():
        with torch.inference_mode():
            return torch.cat([*fit(policy_tools.runs(model, steps=6), 2).betas.values()])

    return model, run


def searching():
    with torch.inference_mode():  # as the host's loaders make a model
        model = small()

    def run():
        with torch.inference_mode():
            policy, table = search(policy_tools.runs(model), 2, 0.1)
        return torch.tensor([*policy.weights, *table.encode()])

    return model, run


def cascade():
    model = frecas_tools.pixels("unet", **SMALL)
    main = guided(model, pag(model))
    return main, lambda: torch.cat([part.flatten() for part in frecas_tools.sample(main, frecas_tools.text("unet"), map_weight=0.5)])


def compare():
    model = small()
    first, second = guided(model, APG(norm_threshold=2.0)), guided(model, pag(model))
    inputs = {"positive": cond(1), "negative": cond(2), "latent": {"samples": latent()}, "seed": 1, "steps": 3, "cfg": 4.0}
    comparison = Comparison(**inputs, sampler_name="euler", scheduler="normal")

    def run():
        with torch.inference_mode():
            return torch.cat([found.samples for found in comparison.run([NamedModel("APG", first), NamedModel("PAG", second)])])

    return second, run


def cfgpp():
    model = small()
    main = guided(model, pag(model), GuidanceInterval(end_percent=0.7))

    def run():
        noise, solver = latent(), cfgpp_sampler("dpmpp_2m", 0.6)
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                main, noise, 1.0, solver, schedule(model), cond(1), cond(2), torch.zeros_like(noise), disable_pbar=True, seed=1
            )

    return main, run


def inversion():
    model = small()
    main = guided(model, pag(model))

    def run():
        with torch.inference_mode():
            return invert(main, cond(1), cond(2), {"samples": latent()}, schedule(model), 0.6)[0]["samples"]

    return main, run


@contextlib.contextmanager
def calls_of(model, moment=None, error=None):
    """The calls of the network; the one of this number raises the error."""
    calls = []

    def network(*_):
        calls.append(1)
        if len(calls) == moment:
            raise error

    handle = model.model.diffusion_model.register_forward_pre_hook(network)
    try:
        yield calls
    finally:
        handle.remove()


def state(model):
    """What a run could leave behind, as values that can be compared."""
    network, options = model.model.diffusion_model, model.model_options
    assert not any("forward" in vars(module) for module in network.modules())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert not comfy.model_management.processing_interrupted()
    inner = options["transformer_options"]
    return {
        "options": {key: list(value) if isinstance(value, (dict, list)) else value for key, value in options.items()},
        "transformer options": {key: list(value) if isinstance(value, (dict, list)) else value for key, value in inner.items()},
        "plan": inner.get(PLAN),
        "wrappers": {kind: {key: list(found) for key, found in by_key.items()} for kind, by_key in model.wrappers.items()},
        "additional models": model.get_additional_models_with_key(LODESTAR),
        "patches": (dict(model.object_patches), list(model.patches), list(model.hook_patches), list(model.backup)),
        "parameters": [(id(weight), weight.requires_grad, weight.grad) for weight in network.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()],
    }


def runs_alive():
    gc.collect()
    return sum(type(found) is Run for found in gc.get_objects())  # isinstance would ask objects of torch that warn


@pytest.mark.parametrize("kind", [plain, fitting, searching, cascade, compare, cfgpp, inversion])
def test_the_next_run_is_as_if_nothing_had_been(kind):
    model, run = kind()
    with calls_of(model) as calls:
        expected = run()
    before, alive = state(model), runs_alive()
    for error in ERRORS:
        for moment in (1, 1 + len(calls) // 2, len(calls)):
            with calls_of(model, moment, error) as seen, pytest.raises(error):
                run()
            assert len(seen) == moment
            assert state(model) == before
    assert runs_alive() <= alive
    with calls_of(model) as again:
        assert torch.equal(run(), expected)
    assert len(again) == len(calls)
    assert state(model) == before
