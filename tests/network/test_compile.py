"""The host's TorchCompileModel, on a model before and after our nodes, with every rule: the results of the network as it is written."""

from __future__ import annotations

import pytest
import tools
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from frecas_tools import cascade, pixels
from torch import Tensor
from torch._dynamo.utils import counters

from lodestar.guiders.cfgpp.sampler import cfgpp_sampler
from lodestar.guiders.engine.compiling import uncompiled
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.network.layers import resolve_layers
from lodestar.guiders.policies.adaptive import AdaptiveGuidance

SMALL = {
    "unet": {
        "num_res_blocks": [1], "channel_mult": (1,), "transformer_depth": [0], "transformer_depth_output": [0, 0],
        "transformer_depth_middle": 1,
    },
    "mmdit": {"num_blocks": 2},
}  # fmt: skip


@pytest.fixture(params=SMALL, scope="module")
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def models(kind):
    """A model, and the same compiled, which has run without any rule, on two rows."""
    torch._dynamo.reset()
    model = pixels(kind, **SMALL[kind])
    compiled = compile_(model)
    before = graphs()
    assert sample(compiled).equal(sample(model))
    assert graphs() > before
    yield model, compiled
    torch._dynamo.reset()


def compile_(model):
    return TorchCompileModel.execute(model, "eager")[0]


def graphs() -> int:
    """How many graphs torch has compiled."""
    return counters["stats"]["unique_graphs"]


def sample(model, **settings) -> Tensor:
    return tools.sample(model, steps=2, latent=tools.empty_latent(model, size=8), **settings)


def pag(model, joint: str) -> tools.PAG:
    return tools.PAG(perturbation=IdentityAttention(resolve_layers(model, "auto"), joint), scale=2.0)


RULES = {
    "PAG": lambda model, weak: pag(model, "masked"),
    "PAG passthrough": lambda model, weak: pag(model, "passthrough"),
    "APG": lambda model, weak: tools.APG(momentum=-0.5),
    "AG": lambda model, weak: AdaptiveGuidance(threshold=-1.0),
    "autoguidance": lambda model, weak: tools.Autoguidance(weak_model=weak, scale=1.5),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_on_a_compiled_model_and_before_it_is_compiled(models, kind, name):
    model, compiled = models
    rule = RULES[name](model, pixels(kind, seed=7, **SMALL[kind]))
    expected = sample(tools.guided(model, rule))
    assert tools.close(sample(tools.guided(compiled, rule)), expected, 1e-6)
    assert tools.close(sample(compile_(tools.guided(model, rule))), expected, 1e-6)


def test_a_batch_of_the_same_shape_without_pag_does_not_take_its_place(models):
    """At cfg 1 PAG's batch has two rows, as the guided one for which the network was compiled; and the other way round."""
    model, compiled = models
    rule = pag(model, "masked")
    assert tools.close(sample(tools.guided(compiled, rule), cfg=1.0), sample(tools.guided(model, rule), cfg=1.0), 1e-6)
    assert sample(compiled).equal(sample(model))


def test_cfgpp(models):
    def run(model) -> Tensor:
        latent = tools.empty_latent(model, size=8)
        sigmas = tools.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
        with torch.inference_mode():
            return tools.comfy.sample.sample_custom(
                model, tools.comfy.sample.prepare_noise(latent, 1), 4.0, cfgpp_sampler("euler", 0.6), sigmas, tools.cond(1), tools.cond(2),
                latent, disable_pbar=True, seed=1,
            )  # fmt: skip

    model, compiled = models
    assert tools.close(run(compiled), run(model), 1e-6)


def end_of_cascade(model, kind, windows="", **settings) -> Tensor:
    """What two stages make."""
    end = 0.4 if kind == "mmdit" else 0.9
    whole = cascade(model, f"8x8: 2 steps, end {end}; 16x16: 2 steps{windows}", **settings)
    with torch.inference_mode():
        return whole.sample(tools.cond(1), tools.cond(2), 1, whole.latent(None, 1))[-1]["samples"]


def test_cascades_with_maps(models, kind):
    model, compiled = models
    assert tools.close(end_of_cascade(compiled, kind, map_weight=0.6), end_of_cascade(model, kind, map_weight=0.6), 1e-6)
    rule = pag(model, "masked")
    expected = end_of_cascade(tools.guided(model, rule), kind, map_weight=0.6)
    assert tools.close(end_of_cascade(compile_(tools.guided(model, rule)), kind, map_weight=0.6), expected, 1e-6)


def test_cascades_with_windows(models, kind):
    """Every other step has other ones, and the shapes are the same."""
    model, compiled = models
    assert tools.close(end_of_cascade(compiled, kind, ", windows 2x2"), end_of_cascade(model, kind, ", windows 2x2"), 1e-6)


def test_what_runs_uncompiled_ends_with_the_last_of_several_threads():
    """The host calls several devices at once, and torch has one setting for all."""
    stance = lambda: torch._dynamo.eval_frame._stance.stance  # noqa: E731
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert stance() == "force_eager"
    second.__exit__(None, None, None)
    assert stance() == "default"
