"""From stage to stage: noise, pixels, and conditioning at the next size."""

from __future__ import annotations

import pytest
import tools
import torch
from frecas_tools import KINDS, pixels, sample, text
from tools import close, comfy, cond, tiny
from torch import Tensor

from lodestar.demo.models import load_vae
from lodestar.guiders.frecas.transition import decode, encode, enlarge, renoise, rescale_conditioning, resize, stage_noise, stage_seed

# --- noise -----------------------------------------------------------------------------------------------------------


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


# --- pixels ----------------------------------------------------------------------------------------------------------


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
