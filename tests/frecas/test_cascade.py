"""The cascade: against a loop written from the paper, against the graph of its parts, and with everything that may be around it."""

from __future__ import annotations

import contextlib
import gc
import math

import numpy as np
import pytest
import tools
import torch
from test_frequency import reference as fa_cfg
from tools import close, comfy, cond, custom, tiny
from torch import Tensor

from lodestar.demo.models import ShapesLatent, load_vae
from lodestar.guiders.engine.plan import plan_of
from lodestar.guiders.frecas.cascade import Cascade
from lodestar.guiders.frecas.levels import stage_sigmas
from lodestar.guiders.frecas.maps import Maps
from lodestar.guiders.frecas.transition import decode, encode, enlarge, renoise, rescale_conditioning, resize, stage_noise, stage_seed
from lodestar.nodes.frecas import LodestarFreCaS, LodestarStageTransition
from lodestar.nodes.shapers.frequency import LodestarFrequencyGuidance

KINDS = ["unet", "unet_v", "mmdit"]
ENDS = {"unet": 0.9, "unet_v": 0.9, "mmdit": 0.4}


def pixels(kind: str, seed: int = 0):
    """A tiny model of pictures that are their own latents, for the host's pixel-space VAE."""
    model = tiny(kind, seed, in_channels=3, **({} if kind == "mmdit" else {"out_channels": 3}))
    model.model.latent_format = ShapesLatent()
    return model


def text(kind: str, sizes=("16x16", "32x32"), steps=(4, 3)) -> str:
    """Stages that suit a tiny model."""
    ends = [f", end {ENDS[kind]}"] * (len(sizes) - 1) + [""]
    return "; ".join(f"{size}: {n} steps{end}" for size, n, end in zip(sizes, steps, ends, strict=True))


def cascade(model, stages: str, **changes) -> Cascade:
    """A cascade with settings that keep random networks finite."""
    settings = {"cfg": 4.0, "sampler": "euler", "scheduler": "normal", "gamma": 1.5, "high_scale": 9.0, "map_weight": 0.0}
    return Cascade.read(stages, model=model, vae=changes.pop("vae", None) or load_vae(), **settings | changes)


def sample(model, stages: str, positive=None, negative=None, seed=1, latent=None, batch=1, **changes) -> list[Tensor]:
    """The clean latents of all stages."""
    whole = cascade(model, stages, **changes)
    with torch.inference_mode():
        results = whole.sample(positive or cond(1), negative or cond(2), seed, whole.latent(latent, batch))
    return [result["samples"] for result in results]


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


def nodes_graph(model, kind, sizes, steps, high, sampler="euler", scheduler="normal", seed=1, batch=1) -> Tensor:
    """The cascade from ComfyUI's own sampler node and the pack's parts."""
    vae, denoised, sigmas, small = load_vae(), None, None, None
    for i, (size, n) in enumerate(zip(sizes, steps, strict=True)):
        width, height = map(int, size.split("x"))
        end = ENDS[kind] if i < len(sizes) - 1 else 0.0
        latent, sigmas, stream = LodestarStageTransition.execute(
            model, vae, width, height, n, end, scheduler, 1.5, "nearest", seed, i, batch, denoised, sigmas
        ).args
        guided = model
        if i and high is not None:
            band = {"low_width": small[0], "low_height": small[1]}
            guided = LodestarFrequencyGuidance.execute(model, low_scale=4.0, high_scale=high, **band).args[0]
        solver = comfy.samplers.sampler_object(sampler)
        output, denoised = custom.SamplerCustom.execute(guided, i == 0, stream, 4.0, cond(1), cond(2), solver, sigmas, latent).args
        small = width, height
    return output["samples"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sizes", "steps", "sampler", "scheduler"),
    [
        (["16x16", "32x32"], [4, 3], "euler", "normal"),
        (["16x16", "18x18", "32x24"], [4, 3, 2], "dpmpp_2m", "karras"),
        (["16x24", "32x32"], [4, 3], "euler_ancestral", "simple"),
        (["16x16", "32x32"], [4, 3], "heun", "beta"),
    ],
)
def test_the_node_equals_the_graph_of_its_parts_to_the_bit(kind, sizes, steps, sampler, scheduler):
    model = pixels(kind)
    whole = sample(model, text(kind, sizes, steps), sampler=sampler, scheduler=scheduler, batch=2)[-1]
    with torch.inference_mode():
        parts = nodes_graph(model, kind, sizes, steps, 9.0, sampler, scheduler, batch=2)
    assert whole.equal(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_are_cfg_in_every_stage(kind):
    model, sizes, steps = pixels(kind), ["16x16", "32x32"], [4, 3]
    with torch.inference_mode():
        plain = nodes_graph(model, kind, sizes, steps, None)
    assert sample(model, text(kind, sizes, steps), high_scale=4.0)[-1].equal(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_stages_of_one_size_have_no_high_band(kind):
    model, same = pixels(kind), text(kind, ("16x16", "16x16"))
    assert sample(model, same, high_scale=30.0)[-1].equal(sample(model, same, high_scale=4.0)[-1])


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_maps_change_the_stages_after_the_first(kind):
    model, stages = pixels(kind), text(kind)
    plain, mapped = (sample(model, stages, map_weight=weight) for weight in (0.0, 0.6))
    assert mapped[0].equal(plain[0]) and not close(mapped[-1], plain[-1], 1e-3)


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
    assert list(tools.curves_of(log)["Frequency-aware CFG (FA-CFG)"]) == [4, 5, 6]


def test_a_model_without_a_plan_stays_without():
    model = pixels("unet")
    sample(model, text("unet"))
    assert plan_of(model.model_options) is None


# --- the transition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_and_growth_the_transition_returns_a_z0(kind):
    model, sigma = pixels(kind), torch.tensor(0.4)
    sampling = model.get_model_object("model_sampling")
    z0 = torch.rand(2, 3, 16, 16) - 0.5
    clean = enlarge(load_vae(), z0, 16, 16, "nearest")
    torch.testing.assert_close(clean, z0)
    out = renoise(model, clean, sigma, torch.zeros_like(clean))
    x = sampling.noise_scaling(sigma, torch.zeros_like(out), model.model.process_latent_in(out))  # as the host's sampler begins
    a = 0.6 if kind == "mmdit" else 1.0
    torch.testing.assert_close(x, a * model.model.process_latent_in(z0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_noisy_latent_is_as_spread_as_it_should_be(kind):
    model, sigma = pixels(kind), torch.tensor(0.4)
    sampling = model.get_model_object("model_sampling")
    z0 = torch.randn(1, 3, 128, 128) / 5
    out = renoise(model, z0, sigma, stage_noise(z0, 3, 1))
    x = sampling.noise_scaling(sigma, torch.zeros_like(out), model.model.process_latent_in(out))
    a, inner = 0.6 if kind == "mmdit" else 1.0, model.model.process_latent_in(z0).std()
    assert float(x.std()) == pytest.approx(float(((a * inner) ** 2 + sigma**2).sqrt()), rel=0.02)


def test_every_stage_has_its_own_noise():
    latent = torch.zeros(1, 3, 16, 16)
    noises = [stage_noise(latent, 5, stage) for stage in range(4)]
    assert noises[0].equal(comfy.sample.prepare_noise(latent, 5))
    correlations = [float((a * b).mean()) for i, a in enumerate(noises) for b in noises[:i]]
    assert max(map(abs, correlations)) < 0.15
    assert len({stage_seed(2**64 - 1, stage) for stage in range(4)}) == 4


def test_out_of_range_pictures_are_clipped():
    z = torch.full((1, 3, 8, 8), 3.0)
    assert enlarge(load_vae(), z, 16, 16, "nearest").eq(1.0).all()


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_resizing_is_the_hosts(method):
    image = torch.rand(2, 8, 12, 3)
    expected = comfy.utils.common_upscale(image.movedim(-1, 1), 30, 16, method, "disabled").movedim(1, -1).clamp(0, 1)
    assert resize(image, 30, 16, method).equal(expected)
    assert resize(image[:, None], 30, 16, method).equal(expected[:, None])
    assert resize(image, 12, 8, method) is image


KL = {"params": {
    "embed_dim": 4, "ddconfig": {
        "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    },
}}  # fmt: skip


@pytest.fixture(scope="module")
def kl():
    """The host's VAE with a small autoencoder of Stable Diffusion's kind, 8 pixels to a latent pixel."""
    vae = comfy.sd.VAE(sd={"decoder.conv_in.weight": torch.zeros(32, 4, 3, 3)}, config=KL, dtype=torch.float32)
    tools.fill(vae.first_stage_model)
    return vae


def test_a_latent_vae(kl):
    model = tiny("unet")
    results = sample(model, "64x64: 3 steps, end 0.9; 128x96: 2 steps", vae=kl)
    assert [tuple(result.shape) for result in results] == [(1, 4, 8, 8), (1, 4, 12, 16)]
    assert results[-1].isfinite().all()
    assert sample(model, "64x64: 3 steps, end 0.9; 128x96: 2 steps", vae=kl)[-1].equal(results[-1])


@torch.inference_mode()
def test_tiles_when_memory_is_short(kl, monkeypatch):
    latent = torch.randn(1, 4, 72, 8)
    whole = decode(kl, latent)
    coded = encode(kl, whole)
    calls: list[str] = []
    for name in ("decode_tiled", "encode_tiled"):
        method = getattr(kl, name)
        monkeypatch.setattr(kl, name, lambda *a, name=name, method=method, **k: calls.append(name) or method(*a, **k))
    monkeypatch.setattr(kl.patcher, "get_free_memory", lambda device: 0)
    tiled = decode(kl, latent)
    assert tiled.shape == whole.shape and encode(kl, tiled).shape == coded.shape
    assert calls == ["decode_tiled", "encode_tiled"]
    assert (tiled - whole).abs().mean() < 0.1


# --- conditioning ----------------------------------------------------------------------------------------------------


def test_conditioning_is_rescaled():
    values = {
        "area": (8, 16, 2, 4), "width": 1024, "height": 512, "crop_w": 8, "crop_h": 4, "target_width": 1024, "target_height": 512,
        "gligen": ("position", None, [("embedding", 4, 8, 1, 2)]), "strength": 0.5, "mask": None,
    }  # fmt: skip
    [[_, scaled]] = rescale_conditioning([[None, values]], 1.5, 2.0)
    assert scaled == {
        "area": (12, 32, 3, 8), "width": 2048, "height": 768, "crop_w": 16, "crop_h": 6, "target_width": 2048, "target_height": 768,
        "gligen": ("position", None, [("embedding", 6, 16, 2, 4)]), "strength": 0.5, "mask": None,
    }  # fmt: skip
    assert values["area"] == (8, 16, 2, 4)
    video = rescale_conditioning([[None, {"area": (3, 8, 16, 1, 2, 4)}]], 1.5, 2.0)
    assert video[0][1]["area"] == (3, 12, 32, 1, 3, 8)
    share = {"area": ("percentage", 0.5, 0.5, 0.0, 0.5)}
    assert rescale_conditioning([[None, share]], 2.0, 2.0) == [[None, share]]


def left_half(side: int) -> Tensor:
    """A mask."""
    return torch.arange(side).lt(side // 2).float().expand(1, side, side)


@pytest.mark.parametrize("region", ["area", "mask"])
def test_an_area_in_pixels_is_the_same_region_in_every_stage(region):
    """Halves with a prompt of their own each: the same as with shares of the picture, or with a mask of any size."""
    model, stages = pixels("unet"), text("unet")
    given = {
        "area": [{"area": (16, 8, 0, 0)}, {"area": (16, 8, 0, 8)}],
        "mask": [{"mask": half} for left in [left_half(16)] for half in (left, 1 - left)],
    }[region]
    other = {
        "area": [{"area": ("percentage", 1.0, 0.5, 0.0, 0.0)}, {"area": ("percentage", 1.0, 0.5, 0.0, 0.5)}],
        "mask": [{"mask": half} for left in [left_half(32)] for half in (left, 1 - left)],
    }[region]
    both = [[*cond(1, **left), *cond(3, **right)] for left, right in (given, other)]
    results = [sample(model, stages, positive=positive, map_weight=0.6)[-1] for positive in both]
    if region == "area":
        assert results[0].equal(results[1])
    assert results[0].isfinite().all() and not close(results[0], sample(model, stages, map_weight=0.6)[-1], 1e-2)


def test_a_controlnet_hint_fits_every_stage():
    """The host resizes a hint whenever the latent's size changes."""

    class Seen(comfy.controlnet.ControlBase):
        sizes: list = []  # noqa: RUF012

        def get_control(self, x, *_):
            self.sizes.append(tuple(x.shape[-2:]))
            return {"input": [], "middle": [torch.full((len(x), 64, x.shape[2] // 2, x.shape[3] // 2), 0.1)], "output": []}

        def copy(self):
            return self

        def get_models(self):
            return []

    control = Seen()
    positive = cond(1, control=control, control_apply_to_uncond=True)
    result = sample(pixels("unet"), text("unet"), positive=positive)[-1]
    assert set(control.sizes) == {(16, 16), (32, 32)} and result.isfinite().all()


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
    assert not [thing for thing in gc.get_objects() if type(thing) is Maps and (thing._layers or thing._sized)]


# --- the nodes -------------------------------------------------------------------------------------------------------


def node(model, **changes):
    """The FreCaS node's outputs."""
    settings = {
        "seed": 1, "cfg": 4.0, "sampler": "euler", "scheduler": "normal", "stages": text("unet"), "gamma": -1.0, "high_scale": 9.0,
        "map_weight": 0.6, "resize": "nearest", "batch_size": 2,
    }  # fmt: skip
    with torch.inference_mode():
        return LodestarFreCaS.execute(model, cond(1), cond(2), load_vae(), **settings | changes).args


def test_the_node_hands_out_every_stage():
    final, stages = node(pixels("unet"))
    assert [latent["samples"].shape[-1] for latent in stages] == [16, 32] and stages[-1]["samples"] is final["samples"]
    assert len(final["samples"]) == 2


def test_the_authors_gamma():
    model = pixels("unet")
    assert node(model)[0]["samples"].equal(node(model, gamma=1.5)[0]["samples"])
    start = float(cascade(model, text("unet"), gamma=0.0).schedules()[1][0])
    assert start == pytest.approx(ENDS["unet"])
    np.testing.assert_allclose(float(cascade(model, text("unet")).schedules()[1][0]), ENDS["unet"] * 2**0.75, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": "16x16: 4 steps, end 14; 32x32: 2 steps"}, r"ends at 14, which gamma 1\.5 shifts to 23\.55, not below the model's"),
        ({"stages": "16x16: 4 steps, end 0.5; 32x32: 2 steps, end 3; 64x64: 2 steps"}, "32x32 begins at 1 and cannot end at 3"),
        ({"stages": "16x16: 4 steps, end 20; 32x32: 2 steps"}, r"first stage cannot end at 20; the model's highest noise level is 14\.61"),
        ({"stages": "16 by 16"}, "'16 by 16' is not a stage"),
        ({"latent": {"samples": comfy.nested_tensor.NestedTensor([torch.zeros(1, 3, 8, 8)])}}, "this latent packs several parts"),
    ],
)
def test_errors_come_before_sampling(changes, message):
    model = pixels("unet")
    with tools.counted(model) as rows, pytest.raises(ValueError, match=rf"^FreCaS Cascade.*{message}[^\n]*\.$"):
        node(model, **changes)
    assert not rows


def test_another_owner_of_the_cfg_combination_is_named_before_sampling():
    model = pixels("unet")
    model.set_model_sampler_cfg_function(lambda args: args["cond"])
    with tools.counted(model) as rows, pytest.raises(ValueError, match=r"Frequency-aware CFG \(FA-CFG\) and .* both replace"):
        node(model)
    assert not rows and node(model, high_scale=4.0)


def transition(model, width=32, denoised=None, sigmas=None, **changes):
    settings = {"height": width, "steps": 3, "end": 0.0, "scheduler": "normal", "gamma": -1.0, "resize": "nearest"}
    more = {"seed": 1, "stage": 1, "batch_size": 1}
    return LodestarStageTransition.execute(model, load_vae(), width, denoised=denoised, sigmas=sigmas, **settings | more | changes).args


def test_the_transition_node_refuses_what_it_cannot_do():
    model, latent = pixels("mmdit"), {"samples": torch.zeros(1, 3, 16, 16)}
    sigmas = stage_sigmas(model.get_model_object("model_sampling"), "normal", 3, end=0.4)
    with pytest.raises(ValueError, match="connect both denoised and sigmas, or neither"):
        transition(model, denoised=latent)
    with pytest.raises(ValueError, match="cannot keep to a noise mask; use the FreCaS Cascade node"):
        transition(model, denoised=latent | {"noise_mask": torch.ones(1, 16, 16)}, sigmas=sigmas)
    with pytest.raises(ValueError, match="33x33 is not a multiple of 2 pixels; the nearest valid size is 34x34"):
        transition(model, width=33, denoised=latent, sigmas=sigmas)
    noisy, levels, seed = transition(model, denoised=latent, sigmas=sigmas)
    assert noisy["samples"].shape == (1, 3, 32, 32) and len(levels) == 4 and seed == stage_seed(1, 1)


def test_the_first_transition_is_an_empty_latent():
    latent, sigmas, seed = transition(pixels("unet"), batch_size=3, stage=0, end=0.9)
    assert latent["samples"].shape == (3, 3, 32, 32) and not latent["samples"].any()
    assert float(sigmas[-2]) == pytest.approx(0.9) and seed == 1


def test_what_a_split_schedule_leaves_to_the_solver_is_discarded():
    """Levels from ComfyUI's own SplitSigmas do not end in 0; the last evaluated one counts."""
    model = pixels("unet")
    sampling = model.get_model_object("model_sampling")
    whole = comfy.samplers.calculate_sigmas(sampling, "normal", 10)
    levels = transition(model, denoised={"samples": torch.zeros(1, 3, 16, 16)}, sigmas=whole[:7], gamma=0.0)[1]
    assert float(levels[0]) == pytest.approx(float(whole[5]))
