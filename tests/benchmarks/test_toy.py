"""What the help pages' toy pictures show, as numbers, and the closed forms that they rest on."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from PIL import Image

from lodestar.benchmarks import toy
from lodestar.guiders.shapers.apg import projected_update

torch.set_num_threads(1)
trees, rings, tokens = cache(toy.tree_scene), cache(toy.ring_scene), cache(toy.token_scene)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
def test_the_denoiser_follows_from_the_density(sigma):
    """Tweedie: D(x) = x + sigma^2 grad log p(x; sigma)."""
    mixture = toy.TREE | toy.OTHER_TREE
    x = mixture.draw(50, sigma=sigma).requires_grad_()
    (score,) = torch.autograd.grad(mixture.blurred(sigma).log_density(x).sum(), x)
    torch.testing.assert_close(mixture.denoised(x, sigma), x + sigma**2 * score)


def test_the_exact_denoiser_samples_the_data():
    x = toy.heun(toy.TREE.denoised, toy.TREE.draw(300, sigma=5.0), toy.edm_sigmas(24))
    outside, lost = toy.tree_measures(x)
    assert outside < 0.04 and lost <= 2
    torch.testing.assert_close(x.mean(0), toy.TREE.draw(4000).mean(0), atol=0.06, rtol=0)


def test_autoguidance_returns_to_the_data_and_keeps_the_branches():
    outside, lost = toy.tree_measures(trees(500)["no guidance"])
    guided_outside, guided_lost = toy.tree_measures(trees(500)["autoguidance, w 3"])
    assert outside > 0.2 and guided_outside < outside / 5
    assert lost <= 2 and guided_lost <= 2


def test_cfg_returns_to_the_data_but_loses_branches():
    outside, lost = toy.tree_measures(trees(500)["CFG, w 4"])
    assert outside < 0.1 and lost >= 6


def test_cfg_in_an_interval_keeps_the_branches():
    outside, _ = toy.tree_measures(trees(500)["no guidance"])
    limited, lost = toy.tree_measures(trees(500)["CFG, w 4, interval"])
    assert limited < outside / 2 and lost <= 2


def test_cfg_inflates_the_norm_and_apg_keeps_it():
    data, cfg, apg = (points.norm(dim=1).mean().item() for points in rings(20).values())
    assert cfg > data + 0.1
    assert abs(apg - data) < 0.03


def test_apg_stays_in_the_class():
    apg = list(rings(20).values())[2]
    for number, of_class in enumerate(apg.chunk(8)):
        assert toy.RING.shares(of_class)[number] == 1


def test_a_threshold_limits_how_far_guidance_moves_a_prediction():
    x = toy.RING.draw(100, sigma=1.0)
    cond = toy.only(toy.RING, 0).denoised(x, 1.0)
    g = cond - toy.RING.denoised(x, 1.0)
    assert (g.norm(dim=1) > 0.5).any()
    assert projected_update(g, cond, eta=0.0, r=0.5).norm(dim=1).max() <= 0.5


def test_pag_repairs_pictures_that_fall_apart():
    """The perturbed prediction is the exact one of a model whose tokens see only themselves."""
    data, alone, pag = (toy.coherent(x).double().mean().item() for x in tokens(60).values())
    assert data == 1 and alone < 0.5 and pag > 0.85


def test_all_evidence_is_the_exact_denoiser():
    noise = torch.randn(60, toy.TOKENS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = toy.heun(partial(toy.tokens_denoised, share=1.0), 5 * noise, toy.edm_sigmas(24))
    assert toy.coherent(x).all()


def test_the_pictures_are_drawn(tmp_path):
    toy.tree_figure(tmp_path / "tree.png", trees(500), ["no guidance", "CFG, w 4", "autoguidance, w 3"])
    toy.ring_figure(tmp_path / "ring.png", rings(20))
    toy.token_figure(tmp_path / "tokens.png", tokens(60))
    for name in ("tree", "ring", "tokens"):
        file = tmp_path / f"{name}.png"
        assert file.stat().st_size < 60_000
        with Image.open(file) as picture:
            assert picture.size == (900, 344)
