"""FA-CFG against the paper's equation in float64, its invariants, and inside real sampling runs."""

from __future__ import annotations

import pytest
import torch
from fa_cfg_reference import fa_cfg
from torch import Tensor

from lodestar.guiders.engine.start import Start
from lodestar.guiders.engine.step import Step
from lodestar.guiders.shapers.frequency import FrequencyGuidance, banded, low_pass
from lodestar.guiders.spaces import Layout

SHAPES = [(2, 4, 8, 8), (2, 4, 6, 10), (1, 3, 7, 9), (2, 4, 3, 8, 12)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rule(low: float = 7.5, high: float = 35.0, height: int = 4, width: int = 5) -> FrequencyGuidance:
    return FrequencyGuidance(low_scale=low, high_scale=high, low_height=height, low_width=width)


def guided(rule: FrequencyGuidance, c: Tensor, u: Tensor, w: float) -> Tensor:
    """D_c + (w - 1) shape(g), as the engine combines them."""
    return c + (w - 1) * rule.shape(c - u, c, w, Step(0, 1.0, True, Layout()))


# --- the invariants, without a host ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("w", [7.5, 2.0, -1.0, 35.0])
def test_equals_the_papers_equation_at_any_cfg_of_the_sampler(shape, w):
    c, u = random(*shape), random(*shape, seed=1)
    torch.testing.assert_close(guided(rule(), c, u, w), fa_cfg(c, u, 7.5, 35.0, 4, 5))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bands_add_up_and_a_constant_is_all_low(shape):
    x = random(*shape)
    torch.testing.assert_close(low_pass(x, 4, 5) + banded(x, 0.0, 1.0, 4, 5), x)
    torch.testing.assert_close(low_pass(torch.ones_like(x), 4, 5), torch.ones_like(x))


def test_frames_of_a_video_are_pictures():
    x = random(2, 4, 3, 8, 12)
    each = torch.stack([low_pass(frame, 4, 5) for frame in x.unbind(2)], dim=2)
    assert low_pass(x, 4, 5).equal(each)


@pytest.mark.parametrize("w", [7.5, 4.0])
def test_equal_scales_are_cfg(w):
    c, u = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1)
    torch.testing.assert_close(guided(rule(w, w), c, u, w), u.lerp(c, w))
    torch.testing.assert_close(guided(rule(3.0, 3.0), c, u, w), u.lerp(c, 3.0))
    g = c - u
    assert rule(w, w).shape(g, c, w, Step(0, 1.0, True, Layout())) is g


@pytest.mark.parametrize("high", [35.0, 0.0])
def test_a_low_band_of_the_latents_size_leaves_nothing_to_the_high_one(high):
    g = random(2, 4, 8, 10)
    assert low_pass(g, 8, 10).equal(g)
    assert rule(4.0, high, 8, 10).shape(g, g, 4.0, Step(0, 1.0, True, Layout())) is g


def test_noise_space_and_denoised_space_agree():
    """x0 = (x - s eps) / a is affine with coefficients that sum to what CFG's do: guidance commutes with it."""
    c, u, x = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1), random(2, 4, 8, 8, seed=2)
    a, s = 0.6, 0.8
    eps = guided(rule(), c, u, 5.0)
    denoised = guided(rule(), (x - s * c) / a, (x - s * u) / a, 5.0)
    torch.testing.assert_close((x - s * eps) / a, denoised)


def test_more_weight_is_more_detail():
    c, u = random(2, 4, 16, 16), random(2, 4, 16, 16, seed=1)
    detail = [(x - low_pass(x, 8, 8)).norm() for x in (guided(rule(7.5, high, 8, 8), c, u, 7.5) for high in (7.5, 20.0, 35.0))]
    assert detail == sorted(detail)


def test_half_precision():
    g = random(1, 4, 8, 8).half()
    assert banded(g, 1.0, 5.0, 4, 4).dtype == torch.half


def test_latents_that_do_not_fit():
    with pytest.raises(ValueError, match=r"low band of 5x4 latent pixels is larger than the latent of 4x8; set low_width"):
        rule().check(Start(None, None, None, (1, 4, 8, 4)))
    with pytest.raises(ValueError, match="needs a latent with height and width"):
        rule().check(Start(None, None, None, (1, 1, 100)))


# --- in the host -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "unet_v", "mmdit"])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_every_evaluation_of_a_run_equals_the_equation(host, kind, sampler):
    import tools

    checked = []

    def check(args: dict) -> Tensor:
        c, u = args["cond_denoised"].double(), args["uncond_denoised"].double()
        torch.testing.assert_close(args["denoised"].double(), fa_cfg(c, u, 3.0, 9.0, 8, 8), rtol=1e-4, atol=1e-3)
        checked.append(args["sigma"])
        return args["denoised"]

    model = tools.guided(tools.tiny(kind), rule(3.0, 9.0, 8, 8))
    model.set_model_sampler_post_cfg_function(check)
    tools.sample(model, sampler=sampler)
    assert len(checked) == (6 if sampler == "euler" else 11)
    assert tools.log_of(model).nfe == 2 * len(checked)


@pytest.mark.parametrize("kind", ["unet", "unet_v", "mmdit"])
def test_the_samplers_own_cfg_changes_no_bit(host, kind):
    import tools

    model = tools.tiny(kind)
    plain = tools.sample(model, cfg=4.0)
    assert tools.sample(tools.guided(model, rule(4.0, 4.0, 8, 8)), cfg=4.0).equal(plain)
    assert tools.sample(tools.guided(model, rule(4.0, 30.0, 16, 16)), cfg=4.0).equal(plain)
    assert tools.sample(tools.guided(model, rule(4.0, 30.0, 8, 8)), cfg=1.0).equal(tools.sample(model, cfg=1.0))


def test_the_samplers_cfg_does_not_matter(host):
    import tools

    model = tools.guided(tools.tiny("unet"), rule(3.0, 9.0, 8, 8))
    assert tools.close(tools.sample(model, cfg=2.0), tools.sample(model, cfg=6.0), 1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_with_apg_in_graph_order(host, first):
    import tools

    apg = tools.APG(eta=0.0, norm_threshold=3.0, momentum=0.0)
    fa = rule(3.0, 9.0, 8, 8)
    w, seen = 4.0, []

    def check(args: dict) -> Tensor:
        c, u = args["cond_denoised"].double(), args["uncond_denoised"].double()
        g = c - u
        for each in (fa, apg) if first else (apg, fa):
            if each is fa:
                g = (fa_cfg(g, g * 0, 3.0, 9.0, 8, 8) - g) / (w - 1)
            else:
                g = tools.projected_update(g.flatten(1), c.flatten(1), 0.0, 3.0).reshape(g.shape)
        torch.testing.assert_close(args["denoised"].double(), c + (w - 1) * g, rtol=1e-4, atol=1e-3)
        seen.append(1)
        return args["denoised"]

    model = tools.guided(tools.tiny("unet"), *((fa, apg) if first else (apg, fa)))
    model.set_model_sampler_post_cfg_function(check)
    tools.sample(model, cfg=w)
    assert seen


def test_video(host):
    import tools

    model = tools.tiny("wan")
    latent = torch.zeros(1, 16, 2, 8, 8)
    guided_ = tools.sample(tools.guided(model, rule(3.0, 9.0, 4, 4)), latent=latent, steps=3)
    assert guided_.isfinite().all() and not tools.close(guided_, tools.sample(model, latent=latent, steps=3), 1e-3)


def test_a_latent_too_small_is_refused_before_anything_is_evaluated(host):
    import tools

    model = tools.tiny("unet")
    with tools.counted(model) as rows, pytest.raises(ValueError, match="is larger than the latent of 16x16"):
        tools.sample(tools.guided(model, rule(height=32, width=32)))
    assert not rows


def test_the_node_counts_in_pixels(host):
    import tools

    from lodestar.guiders.engine.plan import plan_of
    from lodestar.nodes.shapers.frequency import LodestarFrequencyGuidance

    model = LodestarFrequencyGuidance.execute(tools.tiny("unet"), low_scale=7.5, high_scale=35.0, low_width=512, low_height=256).args[0]
    (found,) = plan_of(model.model_options).rules
    assert (found.low_height, found.low_width) == (32, 64)
