"""The policy search: its gradients through the host's samplers, and what it finds."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import tools
import torch
from policy_tools import CFG, STEPS, applied, policy_for, runs, sample

from lodestar.benchmarks import _tiny
from lodestar.guiders.learning.gradients import gradients
from lodestar.guiders.learning.samplers import SAMPLERS
from lodestar.guiders.policies.relaxation import distance, options
from lodestar.guiders.policies.search import SearchSampler, search

CHOICES = 5


# --- gradients through the host --------------------------------------------------------------------------------------


def gradient(model, logits, sampler="euler", cost_weight=0.1):
    """Loss and gradient of one run."""
    these = runs(model, sampler=sampler)
    with gradients():
        logits = logits.clone().requires_grad_()
        searcher = SearchSampler(these.sampler, logits, options(CFG), cost_weight)
        these.sample(these.guider(0, model), 0, searcher)
    return searcher.loss, logits.grad


def some_logits(seed: int = 0) -> torch.Tensor:
    """[STEPS, CHOICES]."""
    return torch.randn(STEPS, CHOICES, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["unet", "mmdit", "flux"])
def test_the_gradient_is_that_of_finite_differences(kind):
    """Along the gradient itself, and along one logit. Flux's blocks write into what they are given."""
    model, logits = _tiny.tiny("flux") if kind == "flux" else tools.tiny(kind), some_logits()
    _, grad = gradient(model, logits)
    single = torch.zeros_like(logits)
    single[1, 3] = 1.0
    for direction in (grad / grad.norm(), single):
        ahead, behind = (gradient(model, logits + step * direction)[0] for step in (0.02, -0.02))
        assert (ahead - behind) / 0.04 == pytest.approx(float((grad * direction).sum()), rel=0.02, abs=1e-5)


def test_networks_whose_rotary_embeddings_are_fused_have_gradients():
    """Wan: the host's fused kernels have none."""
    with torch.inference_mode():
        model = tools.tiny("wan")
        latent = {"samples": torch.zeros(1, 16, 1, 8, 8)}
        policy, _ = search(runs(model, latent=latent, steps=2), 2, 0.1)
    assert len(policy.weights) == 2
    assert not tools.comfy.model_management.in_training


@pytest.mark.parametrize(
    "name", ["euler", "heun", "heunpp2", "dpm_2", "lms", "dpmpp_2m", "ipndm", "ipndm_v", "gradient_estimation", "ddim"]
)
def test_every_listed_sampler_is_differentiable(name):
    assert name in (*SAMPLERS, "ddim")
    model, logits = tools.tiny("unet"), some_logits()
    _, grad = gradient(model, logits, name)
    direction = grad / grad.norm()
    ahead, behind = (gradient(model, logits + step * direction, name)[0] for step in (0.02, -0.02))
    assert (ahead - behind) / 0.04 == pytest.approx(float(grad.norm()), rel=0.02)


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_checkpoints_change_no_gradient_and_keep_only_latents(kind, monkeypatch):
    """What autograd holds after the forward pass is a few latents per step, however large the network is."""
    model, logits = tools.tiny(kind), some_logits()
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with_checkpoints = gradient(model, logits)
    latent = tools.empty_latent(model, size=8).numel()
    assert max(kept) <= latent
    few = sum(kept)
    assert few < 12 * STEPS * latent

    kept.clear()
    monkeypatch.setattr("lodestar.guiders.policies.search.checkpointed", contextlib.nullcontext)
    monkeypatch.setattr("lodestar.guiders.policies.search.checkpointed_call", lambda function, *args: function(*args))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        without = gradient(model, logits)
    assert with_checkpoints[0] == pytest.approx(without[0], rel=1e-5)
    assert tools.close(with_checkpoints[1], without[1], 1e-4)
    assert sum(kept) > 50 * few


def test_patches_of_other_packs_see_their_block_again_in_the_second_run():
    """The host goes on writing into transformer_options between blocks."""
    seen = []

    def patch(q, k, v, extra_options):
        seen.append(extra_options["block"])
        return q, k, v

    model = tools.tiny("unet")
    model.set_model_attn1_patch(patch)
    gradient(model, some_logits())
    times = {block: seen.count(block) for block in dict.fromkeys(seen)}
    assert len(times) > 3 and len({count / (2 if block[0] == "middle" else 1) for block, count in times.items()}) == 1


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "dpm_adaptive", "res_multistep", "uni_pc"])
def test_samplers_that_cannot_be_differentiated_are_refused(name):
    with pytest.raises(ValueError, match=r"the sampler .* cannot be differentiated; use one of euler, heun, .*, or ddim\.$"):
        search(runs(tools.tiny("unet"), sampler=name), 1, 0.1)


def test_a_sampler_that_adds_noise_is_refused():
    sampler = tools.comfy.samplers.ksampler("euler", {"s_churn": 1.0})
    with pytest.raises(ValueError, match="the sampler euler adds noise"):
        search(replace(runs(tools.tiny("unet")), sampler=sampler), 1, 0.1)


# --- the search ------------------------------------------------------------------------------------------------------


def planted(gaps):
    """A model of which the best policy is known: D_u is 0 and D_c - D_u a constant on pixels of the step's own, of norm ``gaps[t]``.

    A step's weight then moves these pixels and no others, so that the distance is a sum over the steps.
    """
    model = tools.tiny("mmdit")
    sigmas = runs(model, steps=len(gaps)).sigmas

    def network(apply_model, args):
        x, t = args["input"], args["timestep"]
        step = int((sigmas[:-1] - float(t[0])).abs().argmin())
        push = torch.zeros_like(x)
        push[:, step] = gaps[step] / (sigmas[step] - sigmas[step + 1])  # of the score, so that one step moves the pixels by the gap
        labels = args["cond_or_uncond"]
        d = torch.cat([part * (label == 0) for label, part in zip(labels, push.chunk(len(labels)), strict=True)])
        return x - t.reshape(-1, 1, 1, 1) * d

    model.set_model_unet_function_wrapper(network)
    return model


def test_it_finds_the_planted_policy():
    """Steps with a large gap are worth two evaluations, those without a gap are not."""
    gaps = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    with torch.inference_mode():
        model = planted(gaps)
        policy, report = search(runs(model, steps=len(gaps)), 60, 0.05)
    assert all(weight == CFG if gap else weight in (0, 1) for weight, gap in zip(policy.weights, gaps, strict=True))
    assert policy.nfe == 9
    assert report.splitlines()[-1].split()[-1] == "9"
    assert policy.setting.steps == 6 and policy.setting.cfg == CFG and policy.setting.sampler == "euler"
    assert tools.sample(model, steps=1).isfinite().all()


def test_without_cost_and_with_nothing_but_cost():
    """Free evaluations: CFG everywhere. Dear ones: one evaluation everywhere."""
    with torch.inference_mode():
        model = planted([1.0] * 3)
        assert search(runs(model, steps=3), 60, 0.0)[0].weights == (CFG,) * 3
        assert search(runs(model, steps=3), 60, 100.0)[0].nfe == 3


def test_searching_twice_finds_the_same_and_leaves_the_model_alone():
    with torch.inference_mode():
        model = tools.tiny("unet")
    before = tools.sample(model)
    blocks = [name for name, module in model.model.diffusion_model.named_modules() if "forward" in vars(module)]
    with torch.inference_mode():
        first, second = (search(runs(model, positive=[tools.cond(1), tools.cond(3)]), 3, 0.1) for _ in range(2))
    assert first == second
    assert tools.sample(model).equal(before)
    assert [name for name, module in model.model.diffusion_model.named_modules() if "forward" in vars(module)] == blocks == []
    assert all(parameter.is_inference() for parameter in model.model.diffusion_model.parameters())


@pytest.mark.parametrize("moment", [2, 9])
def test_an_interrupted_search_leaves_nothing(moment):
    """In the CFG run, and in the run with gradients."""
    with torch.inference_mode():
        model = tools.tiny("unet")
    before = tools.sample(model)
    stopping, _ = tools.interrupted_at(model, moment)
    with torch.inference_mode(), pytest.raises(tools.comfy.model_management.InterruptProcessingException):
        search(runs(stopping), 2, 0.1)
    assert tools.sample(model).equal(before)
    assert not any("forward" in vars(module) for module in model.model.diffusion_model.modules())


def test_a_model_with_other_guidance_is_refused():
    model = tools.tiny("unet")
    with pytest.raises(ValueError, match="needs plain CFG at every step; bypass PAG"):
        search(runs(tools.guided(model, tools.pag(model))), 1, 0.1)
    with pytest.raises(ValueError, match="cfg 1 is none"):
        search(runs(model, cfg=1.0), 1, 0.1)


def test_easycache_is_refused():
    from comfy_extras.nodes_easycache import EasyCacheNode

    cached = EasyCacheNode.execute(tools.tiny("unet"), 0.3, 0.15, 0.95, False).result[0]
    with pytest.raises(ValueError, match="needs every forward pass, and EasyCache leaves some out; bypass EasyCache"):
        search(runs(cached), 1, 0.1)


def test_what_is_searched_is_what_is_sampled():
    """With certain logits, the search's own run is the policy's run on the host."""
    model, weights = tools.tiny("unet"), (12.0, 6.0, 1.0, 0.0)
    logits = torch.tensor([[50.0 * (option == weight) for option in options(CFG)] for weight in weights])
    loss, _ = gradient(model, logits, cost_weight=0.0)
    latent = tools.empty_latent(model, size=8)
    far = distance(sample(applied(model, policy_for(model, weights)), latent=latent, seed=5), sample(model, latent=latent, seed=5))
    assert loss == pytest.approx(float(far), rel=1e-3)
