"""APG against its listing in float64, against diffusers, against the host's own node, and inside real sampling runs."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from lodestar.guiders.engine.step import Step
from lodestar.guiders.shapers.apg import APG, project, projected_update
from lodestar.guiders.spaces import Layout

SETTINGS = [(0.0, 15.0, -0.5), (0.0, 2.5, -0.75), (1.0, 5.0, 0.0), (0.0, 0.0, 0.0), (0.5, 7.5, -0.25), (-1.0, 1.0, 0.9)]
SHAPES = [(2, 4, 60), (2, 4, 6, 10), (2, 4, 3, 4, 5)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def listing(cond: Tensor, uncond: Tensor, w: float, eta: float, r: float, beta: float, m: Tensor | None) -> tuple[Tensor, Tensor]:
    """The paper's listing for one sample in float64: (D, new momentum buffer)."""
    diff = cond.double() - uncond.double()
    if beta != 0:
        m = diff if m is None else diff + beta * m
        diff = m
    if r > 0:
        diff = diff * min(1.0, r / (diff.square().sum().sqrt().item() or math.inf))
    unit = cond.double() / cond.double().square().sum().sqrt()
    parallel = (diff * unit).sum() * unit
    return cond + (w - 1) * (diff - parallel + eta * parallel), m


def step(memory: dict | None = None, first: bool = True, layout: Layout | None = None) -> Step:
    return Step(0, 1.0, first, layout or Layout(), {} if memory is None else memory)


def guided(rule: APG, cond: Tensor, uncond: Tensor, w: float, at: Step | None = None) -> Tensor:
    """D_c + (w - 1) g', as the engine combines them."""
    return cond + (w - 1) * rule.shape(cond - uncond, cond, w, at or step())


def rule(eta: float = 0.0, r: float = 0.0, beta: float = 0.0) -> APG:
    return APG(eta=eta, norm_threshold=r, momentum=beta)


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(D_c, D_u) whose samples differ in size."""
    sizes = torch.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1)) ** 2 / 4
    return random(*shape, dtype=dtype) * sizes.to(dtype), random(*shape, seed=1, dtype=dtype) * sizes.to(dtype)


# --- the invariants, without a host ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_the_listing_over_three_steps(setting, shape):
    memory, buffers = {}, [None, None]
    for seed in range(3):
        cond, uncond = random(*shape, seed=seed), random(*shape, seed=9 + seed)
        out = guided(rule(*setting), cond, uncond, 7.5, step(memory))
        for i in range(2):
            expected, buffers[i] = listing(cond[i], uncond[i], 7.5, *setting, buffers[i])
            torch.testing.assert_close(out[i].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("w", [-1.0, 0.0, 1.0, 4.0, 15.0])
def test_neutral_settings_are_cfg(w):
    cond, uncond = pair(3, 4, 8, 8)
    assert rule(1, 0, 0).neutral and not any(rule(*setting).neutral for setting in SETTINGS)
    torch.testing.assert_close(guided(rule(1, 0, 0), cond, uncond, w), uncond.lerp(cond, w), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_scale_1_is_the_conditional_prediction(setting):
    cond, uncond = pair(3, 4, 8, 8)
    assert guided(rule(*setting), cond, uncond, 1.0).equal(cond)


@pytest.mark.parametrize("setting", SETTINGS)
def test_equal_predictions_need_no_guidance(setting):
    cond, _ = pair(3, 4, 8, 8)
    assert guided(rule(*setting), cond, cond, 9.0).equal(cond)


def test_the_buffer_acts_even_when_predictions_are_equal():
    cond, uncond = pair(3, 4, 8, 8)
    memory = {}
    guided(rule(beta=-0.5), cond, uncond, 9.0, step(memory))
    assert not guided(rule(beta=-0.5), cond, cond, 9.0, step(memory)).equal(cond)


@pytest.mark.parametrize("shape", SHAPES)
def test_eta_0_leaves_nothing_along_the_image(shape):
    cond, uncond = pair(*shape, dtype=torch.float64)
    update = guided(rule(0, 3, -0.5), cond, uncond, 9.0) - cond
    cosine = torch.nn.functional.cosine_similarity(update.flatten(1), cond.flatten(1))
    assert cosine.abs().max() < 1e-12


@pytest.mark.parametrize("eta", [-2.0, 0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_stays_in_its_ball(shape, eta):
    cond, uncond = pair(*shape, dtype=torch.float64)
    update = guided(rule(eta, 0.7, -0.5), cond, uncond, 9.0) - cond
    assert (update.flatten(1).norm(dim=1) <= 8 * 0.7 * max(1, abs(eta)) * (1 + 1e-12)).all()


def test_a_threshold_that_never_binds_is_none():
    cond, uncond = pair(3, 4, 8, 8)
    assert guided(rule(0, 1e6), cond, uncond, 9.0).equal(guided(rule(0, 0), cond, uncond, 9.0))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_batch_equals_single_runs(setting):
    memory, alone = {}, [{} for _ in range(4)]
    for seed in range(3):
        cond, uncond = pair(4, 4, 8, 8)
        cond, uncond = cond + seed, uncond - seed
        out = guided(rule(*setting), cond, uncond, 7.0, step(memory))
        for i in range(4):
            single = guided(rule(*setting), cond[i : i + 1], uncond[i : i + 1], 7.0, step(alone[i]))
            torch.testing.assert_close(out[i : i + 1], single, rtol=1e-6, atol=1e-6)


def test_without_momentum_nothing_is_remembered():
    cond, uncond = pair(3, 4, 8, 8)
    memory = {}
    first = guided(rule(0, 5, 0), cond, uncond, 7.0, step(memory))
    assert not memory and first.equal(guided(rule(0, 5, 0), cond, uncond, 7.0, step(memory)))


@pytest.mark.parametrize("beta", [-0.75, -0.5, 0.3])
def test_the_buffer_of_a_constant_update_is_a_geometric_series(beta):
    g, memory = random(2, 4, 8, 8, dtype=torch.float64), {}
    for n in range(1, 12):
        m = rule(beta=beta).with_momentum(g, step(memory))
        torch.testing.assert_close(m, g * (1 - beta**n) / (1 - beta))


def test_momentum_advances_once_per_step():
    g, memory = random(2, 4, 8, 8, dtype=torch.float64), {}
    for n in range(1, 6):
        for stage in range(3):
            m = rule(beta=-0.5).with_momentum(g, step(memory, first=stage == 0))
            torch.testing.assert_close(m, g * (1 - (-0.5) ** n) / 1.5)


def test_momentum_ends_where_the_latent_changes_its_size():
    memory: dict = {}
    apg = rule(0.0, 3.0, -0.5)
    small, large = pair(2, 4, 6, 6), pair(2, 4, 9, 12)
    guided(apg, *small, 4.0, step(memory))
    fresh: dict = {}
    for _ in range(2):
        assert guided(apg, *large, 4.0, step(memory)).equal(guided(apg, *large, 4.0, step(fresh)))
    assert guided(apg, *large, 4.0, step(memory, first=False)).equal(guided(apg, *large, 4.0, step(fresh, first=False)))


def test_a_larger_image_has_the_same_parallel_part():
    cond, uncond = (x.flatten(1) for x in pair(3, 4, 8, 8, dtype=torch.float64))
    g = cond - uncond
    for scale in (1e-3, 7.0, 1e4):
        torch.testing.assert_close(project(g, cond * scale), project(g, cond))


# --- numbers that go wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS)
def test_half_precision_is_projected_in_float64(setting, dtype):
    cond, uncond = random(2, 4, 128, 128, dtype=dtype), random(2, 4, 128, 128, seed=1, dtype=dtype)
    g = cond - uncond
    out = rule(*setting).shape(g, cond, 4.0, step())
    expected = projected_update(g.double().flatten(1), cond.double().flatten(1), *setting[:2]).reshape(g.shape)
    assert out.dtype == dtype and out.equal(expected.to(dtype))


@pytest.mark.parametrize("setting", SETTINGS)
def test_zero_vectors_are_no_direction(setting):
    zeros, g = torch.zeros(2, 4, 8, 8), random(2, 4, 8, 8)
    assert rule(*setting).shape(zeros, g, 4.0, step()).equal(zeros)
    assert rule(*setting).shape(zeros, zeros, 4.0, step()).equal(zeros)
    torch.testing.assert_close(rule(setting[0], 0, setting[2]).shape(g, zeros, 4.0, step()), g)


def test_parts_of_a_packed_latent_are_shaped_apart():
    shapes = [(2, 4, 3, 6, 5), (2, 8, 10)]
    layout, packed = Layout.of(shapes), {}
    conds, unconds = ([random(*shape, seed=i + k) * 3**k for k, shape in enumerate(shapes)] for i in (0, 9))
    memory, alone = {}, [{}, {}]
    for _ in range(3):
        cond, uncond = (torch.cat([x.flatten(1) for x in xs], 1).unsqueeze(1) for xs in (conds, unconds))
        packed = guided(rule(0, 5, -0.5), cond, uncond, 7.0, step(memory, layout=layout))
        for part, *each, memory_ in zip(layout.split(packed), conds, unconds, alone, strict=True):
            single = guided(rule(0, 5, -0.5), *each, 7.0, step(memory_))
            torch.testing.assert_close(part, single.flatten(1), rtol=1e-6, atol=1e-6)


# --- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("original", [True, False])
def test_equals_diffusers(original, setting, shape):
    """Original formulation at scale w - 1. diffusers' default starts from D_u: the same g', one g lower, and not the paper's form."""
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    eta, r, beta = setting
    buffer, memory = (MomentumBuffer(beta) if beta else None), {}
    for seed in range(3):
        cond, uncond = random(*shape, seed=seed, dtype=torch.float64), random(*shape, seed=9 + seed, dtype=torch.float64)
        theirs = normalized_guidance(cond, uncond, 6.5, buffer, eta, r, use_original_formulation=original)
        ours = guided(rule(*setting), cond, uncond, 7.5, step(memory))
        torch.testing.assert_close(theirs if original else theirs + (cond - uncond), ours)


# --- the host --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "unet_v", "mmdit"])
@pytest.mark.parametrize("setting", [(1.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 3.0, -0.5)])
def test_the_hosts_node_is_the_papers_form_one_scale_higher(host, kind, setting):
    """`APG` of the host: D_c + w g'. The paper: D_c + (w - 1) g'."""
    import tools
    from comfy_extras.nodes_apg import APG as HostAPG

    from lodestar.guiders.engine.attach import attach

    model = tools.tiny(kind)
    theirs = tools.sample(HostAPG.execute(model, *setting)[0], cfg=4.0, steps=10)
    ours = tools.sample(attach(model, rule(*setting)), cfg=5.0, steps=10)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("kind", ["unet", "unet_v", "mmdit"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_sde"])
def test_every_evaluation_of_a_run_equals_the_listing_on_denoised_predictions(host, kind, sampler):
    import tools

    from lodestar.guiders.engine.attach import attach
    from lodestar.guiders.engine.run import run_of

    buffers: dict[tuple[int, int], Tensor] = {}
    steps = set()

    def check(args: dict) -> Tensor:
        step = run_of(args["model_options"]).evaluation.index
        for i in range(2):
            buffer = buffers.get((i, step - 1))
            expected, after = listing(args["cond_denoised"][i], args["uncond_denoised"][i], 4.0, 0.0, 3.0, -0.5, buffer)
            buffers.setdefault((i, step), after)  # of a step's stages the first counts
            torch.testing.assert_close(args["denoised"][i].double(), expected, rtol=1e-4, atol=1e-4)
        steps.add(step)
        return args["denoised"]

    model = attach(tools.tiny(kind), rule(0.0, 3.0, -0.5))
    model.set_model_sampler_post_cfg_function(check)
    tools.sample(model, sampler=sampler, latent=tools.empty_latent(model, batch=2))
    assert steps == set(range(6))


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_a_sampler_that_upscales_while_it_samples_begins_anew_at_each_size(host, kind):
    import tools
    from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

    from lodestar.guiders.engine.attach import attach

    buffers: dict[torch.Size, Tensor] = {}
    sizes = []

    def check(args: dict) -> Tensor:
        cond, uncond = args["cond_denoised"], args["uncond_denoised"]
        expected, buffers[cond.shape] = listing(cond[0], uncond[0], 4.0, 0.0, 3.0, -0.5, buffers.get(cond.shape))
        torch.testing.assert_close(args["denoised"][0].double(), expected, rtol=1e-4, atol=1e-4)
        sizes.append(cond.shape[-1])
        return args["denoised"]

    model = attach(tools.tiny(kind), rule(0.0, 3.0, -0.5))
    model.set_model_sampler_post_cfg_function(check)
    solver = SamplerLCMUpscale.execute(2.0, 2, "bilinear").result[0]
    sigmas = tools.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 5)
    latent = tools.empty_latent(model, size=8)
    with torch.inference_mode():
        out = tools.comfy.sample.sample_custom(
            model, torch.ones_like(latent), 4.0, solver, sigmas, tools.cond(1), tools.cond(2), latent, disable_pbar=True, seed=1
        )
    assert sizes == [8, 12, 16, 16, 16] and out.isfinite().all()


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_a_second_run_starts_with_an_empty_buffer(host, kind):
    import tools

    from lodestar.guiders.engine.attach import attach

    model = attach(tools.tiny(kind), rule(0.0, 3.0, -0.5))
    first = tools.sample(model)
    assert tools.sample(model).equal(first)
    assert tools.sample(attach(tools.tiny(kind), rule(0.0, 3.0, -0.5))).equal(first)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_neutral_settings_and_cfg_1_change_no_bit(host, cfg):
    import tools

    from lodestar.guiders.engine.attach import attach

    model = tools.tiny("unet")
    setting = (1.0, 0.0, 0.0) if cfg != 1 else (0.0, 3.0, -0.5)
    assert tools.sample(attach(model, rule(*setting)), cfg=cfg).equal(tools.sample(model, cfg=cfg))


class Spy(APG):
    """Counts what the buffer takes in."""

    seen: ClassVar[list[bool]] = []

    def with_momentum(self, g: Tensor, step: Step) -> Tensor:
        self.seen.append(step.first)
        return super().with_momentum(g, step)


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 6), ("heun", 11), ("dpm_2", 11), ("dpmpp_sde", 11)])
def test_samplers_of_several_stages_advance_the_momentum_once_per_step(host, sampler, evaluations):
    import tools

    from lodestar.guiders.engine.attach import attach

    Spy.seen.clear()
    tools.sample(attach(tools.tiny("unet"), Spy()), sampler=sampler)
    assert (len(Spy.seen), sum(Spy.seen)) == (evaluations, 6)
