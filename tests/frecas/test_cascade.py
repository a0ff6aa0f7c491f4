"""The cascade: against a loop written from the paper, what it costs, and with everything that may be around it."""

from __future__ import annotations

import contextlib
import gc
import math

import pytest
import tools
import torch
from fa_cfg_reference import fa_cfg
from frecas_tools import KINDS, cascade, pixels, sample, text
from tools import close, comfy, cond, tiny
from torch import Tensor

from lodestar.demo.models import ShapesLatent
from lodestar.guiders.engine.plan import plan_of
from lodestar.guiders.frecas.map_patches import MixedAttention
from lodestar.guiders.frecas.maps import Maps
from lodestar.guiders.frecas.transition import resize, stage_seed
from lodestar.guiders.policies.adaptive import AdaptiveGuidance

# --- the algorithm ---------------------------------------------------------------------------------------------------


def predicted(model, x: Tensor, sigma: Tensor, cfg: float) -> Tensor:
    """The host's D at x [B, C, H, W], as the model scales it: one Euler step to 0 without our engine."""
    flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    noise, latent = (x / sigma, x * 0) if flow else (x * 0, model.model.process_latent_out(x))
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            model, noise, cfg, sampler, torch.stack([sigma, sigma * 0]), cond(1), cond(2), latent, disable_pbar=True, seed=1
        )
    return model.model.process_latent_in(out).double()


def paper(model, sizes: list[int], schedules: list[Tensor], gs: float, wh: float, seed: int) -> Tensor:
    """Algorithm (c) with Euler steps, nearest resizes by repetition, pictures as latents: the last latent."""
    sampling = model.get_model_object("model_sampling")
    flow = isinstance(sampling, comfy.model_sampling.CONST)
    scale = ShapesLatent.scale_factor
    x = None
    for i, (size, sigmas) in enumerate(zip(sizes, schedules, strict=True)):
        noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(stage_seed(seed, i))).double()
        first = float(sigmas[0])
        if i == 0:
            x = noise if flow else noise * math.sqrt(1 + first**2)
        else:
            image = (x / scale).clamp(-1, 1).repeat_interleave(size // sizes[i - 1], 2).repeat_interleave(size // sizes[i - 1], 3)
            x = (1 - first if flow else 1) * scale * image + first * noise
        for j, level in enumerate(sigmas[:-1]):
            u, c = (predicted(model, x.float(), level, w) for w in (0.0, 1.0))
            low = sizes[i - 1] if i else size
            d = fa_cfg(c, u, gs, wh if i else gs, low, low)
            last_of_stage = j == len(sigmas) - 2 and i < len(sizes) - 1
            x = d if last_of_stage else x + (x - d) / level.double() * (sigmas[j + 1] - level).double()
    return x / scale


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_papers_algorithm(kind):
    model = pixels(kind)
    stages = text(kind, ("8x8", "16x16", "32x32"), (4, 3, 2))
    schedules = cascade(model, stages).schedules()
    expected = paper(model, [8, 16, 32], schedules, 4.0, 9.0, 1)
    assert close(sample(model, stages)[-1].double(), expected, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral", "ddim"])
def test_one_stage_is_plain_sampling(kind, sampler):
    model = pixels(kind)
    (result,) = sample(model, "16x16: 5 steps", sampler=sampler, map_weight=0.6)
    plain = tools.sample(model, cfg=4.0, steps=5, sampler=sampler, latent=torch.zeros(1, 3, 16, 16), positive=cond(1), negative=cond(2))
    assert result.equal(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_of_one_size_have_no_high_band(kind):
    model, same = pixels(kind), text(kind, ("16x16", "16x16"))
    assert sample(model, same, high_scale=30.0)[-1].equal(sample(model, same, high_scale=4.0)[-1])


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_maps_change_the_stages_after_the_first(kind):
    model, stages = pixels(kind), text(kind)
    plain, mapped = (sample(model, stages, map_weight=weight) for weight in (0.0, 0.6))
    assert mapped[0].equal(plain[0]) and not close(mapped[-1], plain[-1], 1e-3)


EVALUATES_THE_END = [name for name in comfy.samplers.SAMPLER_NAMES if name not in ("dpm_fast", "dpm_adaptive")]


@pytest.mark.parametrize("sampler", EVALUATES_THE_END)
def test_a_stage_hands_over_what_was_predicted_at_its_last_level(sampler):
    """Without FA-CFG (high_scale is cfg), which samplers of CFG++ refuse."""
    model, predictions = pixels("unet"), []

    def spy(args):
        if args["denoised"].shape[-1] == 16 and float(args["sigma"][0]) == pytest.approx(0.9):
            predictions.append(model.model.process_latent_out(args["denoised"]))
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(spy)
    first = sample(model, text("unet", steps=(4, 2)), sampler=sampler, high_scale=4.0)[0]
    assert any(close(first, prediction, 1e-6) for prediction in predictions)


@pytest.mark.parametrize("sampler", ["dpm_fast", "dpm_adaptive"])
def test_samplers_that_choose_their_levels_are_refused(sampler):
    """With one stage there is nothing to hand over."""
    model = pixels("unet")
    with (
        tools.counted(model) as rows,
        pytest.raises(ValueError, match=rf"^FreCaS Cascade and the sampler {sampler} do not go together: [^\n]*use another sampler"),
    ):
        sample(model, text("unet"), sampler=sampler)
    assert not rows
    assert sample(model, "16x16: 4 steps", sampler=sampler)[0].isfinite().all()


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cfg", "branches"), [(4.0, 2), (1.0, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_are_those_of_the_stages(kind, cfg, branches):
    """At cfg 1 the negative prompt is never evaluated: what is left is the cascade alone, for distilled models."""
    model = tools.attach(pixels(kind))
    with tools.counted(model) as rows:
        sample(model, text(kind, ("8x8", "16x16", "24x24"), (4, 3, 2)), cfg=cfg, map_weight=0.6)
    assert sum(rows) == 9 * branches
    assert tools.log_of(model).nfe == 9 * branches


def test_the_report_shows_all_stages_as_one_run():
    model = tools.attach(pixels("unet"))
    sample(model, text("unet"))
    log = tools.log_of(model)
    assert log.steps == 7 and len(log.sigmas) == 8 and log.seconds > 0
    assert list(tools.curves_of(log)["CFG update"]) == list(range(7))
    assert list(tools.curves_of(log)["FA-CFG (Frequency-aware CFG)"]) == [4, 5, 6]


def test_a_model_without_a_plan_stays_without():
    model = pixels("unet")
    sample(model, text("unet"))
    assert plan_of(model.model_options) is None


# --- with everything around it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [("16x16", "32x32"), ("16x24", "32x48"), ("24x16", "32x32"), ("16x16", "18x30", "20x34")])
def test_sizes_and_batches(kind, sizes):
    results = sample(pixels(kind), text(kind, sizes, (3,) * len(sizes)), batch=2, map_weight=0.5)
    assert [(result.shape[-1], result.shape[-2]) for result in results] == [tuple(map(int, size.split("x"))) for size in sizes]
    assert all(result.isfinite().all() and len(result) == 2 for result in results)
    assert not results[-1][0].equal(results[-1][1])


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_with_every_rule_in_every_stage(kind):
    model = pixels(kind)
    rules = [tools.APG(), tools.pag(model), tools.Autoguidance(weak_model=pixels(kind, seed=7), scale=1.5)]
    guided = tools.guided(model, *rules)
    result = sample(guided, text(kind), map_weight=0.6)[-1]
    assert result.isfinite().all() and not close(result, sample(model, text(kind), map_weight=0.6)[-1], 1e-2)
    assert tools.log_of(guided).nfe == 7 * 4
    assert sample(guided, text(kind), map_weight=0.6)[-1].equal(result)


def test_both_branches_have_maps_after_adaptive_guidance_has_stopped_one(monkeypatch):
    """AG stops D_u in the first stage and begins the next one with it: every chunk of that evaluation is mixed with a map."""
    mixed, plain = [], MixedAttention.__call__

    def spy(self, q, k, v, extra_options):
        mixed.append([grid is not None for grid in self.chunks.maps(tuple(extra_options["activations_shape"][-2:]), v.shape[1], v)])
        return plain(self, q, k, v, extra_options)

    monkeypatch.setattr(MixedAttention, "__call__", spy)
    model = tools.guided(pixels("unet"), AdaptiveGuidance(threshold=-1.0))
    sample(model, text("unet"), map_weight=0.6)
    assert [True, True] in mixed and not [chunks for chunks in mixed if len(chunks) == 2 and sum(chunks) == 1]


def test_neutral_rules_change_no_bit():
    model = pixels("unet")
    neutral = [tools.APG(eta=1.0, norm_threshold=0.0, momentum=0.0), tools.pag(model, scale=0.0)]
    assert sample(tools.guided(model, *neutral), text("unet"))[-1].equal(sample(model, text("unet"))[-1])


def test_videos():
    model = tiny("wan")
    model.model.latent_format = type("Frames", (ShapesLatent,), {"latent_channels": 16, "latent_dimensions": 3})()

    class Vae:
        """Frames of 16 channels as they are, for a network that has no small VAE."""

        latent_dim = 3
        spacial_compression_encode = staticmethod(lambda: 1)
        decode = staticmethod(lambda z: (z.movedim(1, -1) + 1) / 2)
        encode = staticmethod(lambda frames: frames.movedim(-1, 0)[None] * 2 - 1)

    results = sample(model, "8x8: 3 steps, end 0.6; 16x12: 2 steps", vae=Vae(), latent={"samples": torch.zeros(2, 16, 3, 8, 8)})
    assert [tuple(result.shape) for result in results] == [(2, 16, 3, 8, 8), (2, 16, 3, 12, 16)]
    assert results[-1].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", ["first", "last"])
def test_painting_into_a_picture(kind, known):
    """Outside the mask every stage is the given picture at its size; inside it is new."""
    model, side = pixels(kind), 16 if known == "first" else 32
    picture = torch.rand(1, 3, side, side) * 1.6 - 0.8
    mask = torch.zeros(1, side, side)
    mask[:, :, side // 2 :] = 1
    results = sample(model, text(kind), latent={"samples": picture, "noise_mask": mask}, map_weight=0.5)
    for result in results:
        size = result.shape[-1]
        kept = resize((picture.movedim(1, -1) + 1) / 2, size, size, "nearest").movedim(-1, 1) * 2 - 1
        torch.testing.assert_close(result[..., : size // 2 - 2], kept[..., : size // 2 - 2], rtol=1e-4, atol=1e-4)
        assert not close(result[..., size // 2 :], kept[..., size // 2 :], 0.1)


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_the_same_seed_gives_the_same_bits(kind):
    model = tools.guided(pixels(kind), tools.APG(norm_threshold=3.0))
    run = lambda seed=1: sample(model, text(kind), seed=seed, sampler="euler_ancestral", map_weight=0.6)[-1]  # noqa: E731
    first = run()
    assert not run(2).equal(first) and run().equal(first)


@pytest.fixture
def every_step_shown(monkeypatch):
    """The host leaves out progress that comes too fast."""
    for name in [name for name in vars(comfy.utils) if name.startswith("PROGRESS_THROTTLE")]:
        monkeypatch.setattr(comfy.utils, name, 0)


@pytest.mark.parametrize("at", [1, 5])
def test_interrupted_and_repeated(at, every_step_shown):
    model = pixels("unet")
    expected = sample(model, text("unet"), map_weight=0.6)[-1]
    steps = []

    def hook(value, total, preview, **_):
        steps.append(value)
        if len(steps) == at + 1:
            raise comfy.model_management.InterruptProcessingException

    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(model, text("unet"), map_weight=0.6)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert sample(model, text("unet"), map_weight=0.6)[-1].equal(expected)


def test_one_progress_bar_over_all_stages(every_step_shown):
    seen = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: seen.append((value, total)))
    try:
        sample(pixels("unet"), text("unet"), sampler="heun")
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert seen == [(step, 7) for step in range(1, 8)]


@pytest.mark.parametrize("interrupted", [False, True])
def test_maps_go_with_the_run(interrupted):
    model, calls = pixels("unet"), []

    def count(args):
        calls.append(1)
        if interrupted and len(calls) == 6:
            raise comfy.model_management.InterruptProcessingException
        return args["denoised"]

    model.set_model_sampler_post_cfg_function(count)
    with contextlib.suppress(comfy.model_management.InterruptProcessingException):
        sample(model, text("unet"), map_weight=0.6)
    assert len(calls) == (6 if interrupted else 7)
    assert not [thing for thing in gc.get_objects() if type(thing) is Maps and not thing.empty]


def test_an_empty_video_of_another_models_length():
    """Its ratios are those for which its size was computed, as for the host's sampler nodes."""
    model = pixels("mmdit")
    model.model.latent_format.temporal_downscale_ratio, model.model.latent_format.latent_dimensions = 2, 3
    given = {"samples": torch.zeros(1, 3, 2, 16, 16), "downscale_ratio_temporal": 4}
    assert cascade(model, text("mmdit")).latent(given, 1)["samples"].shape == (1, 3, 4, 16, 16)
