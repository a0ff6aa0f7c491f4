"""What the help pages' toy pictures show, as numbers, and the closed forms that they rest on."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from PIL import Image

from lodestar.benchmarks.toy import mixtures, rings, tokens, trees
from lodestar.guiders.shapers.apg import projected_update

torch.set_num_threads(1)
tree_scene, ring_scene, token_scene = cache(trees.scene), cache(rings.scene), cache(tokens.scene)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
def test_the_denoiser_follows_from_the_density(sigma):
    """Tweedie: D(x) = x + sigma^2 grad log p(x; sigma)."""
    mixture = trees.TREE | trees.OTHER_TREE
    x = mixture.draw(50, sigma=sigma).requires_grad_()
    (score,) = torch.autograd.grad(mixture.blurred(sigma).log_density(x).sum(), x)
    torch.testing.assert_close(mixture.denoised(x, sigma), x + sigma**2 * score)


def test_the_exact_denoiser_samples_the_data():
    x = mixtures.heun(trees.TREE.denoised, trees.TREE.draw(300, sigma=5.0), mixtures.edm_sigmas(24))
    outside, lost = trees.measures(x)
    assert outside < 0.04 and lost <= 2
    torch.testing.assert_close(x.mean(0), trees.TREE.draw(4000).mean(0), atol=0.06, rtol=0)


def test_autoguidance_returns_to_the_data_and_keeps_the_branches():
    outside, lost = trees.measures(tree_scene(500)["no guidance"])
    guided_outside, guided_lost = trees.measures(tree_scene(500)["autoguidance, w 3"])
    assert outside > 0.2 and guided_outside < outside / 5
    assert lost <= 2 and guided_lost <= 2


def test_cfg_returns_to_the_data_but_loses_branches():
    outside, lost = trees.measures(tree_scene(500)["CFG, w 4"])
    assert outside < 0.1 and lost >= 6


def test_cfg_in_an_interval_keeps_the_branches():
    outside, _ = trees.measures(tree_scene(500)["no guidance"])
    limited, lost = trees.measures(tree_scene(500)["CFG, w 4, interval"])
    assert limited < outside / 2 and lost <= 2


def test_cfg_inflates_the_norm_and_apg_keeps_it():
    data, cfg, apg = (points.norm(dim=1).mean().item() for points in ring_scene(20).values())
    assert cfg > data + 0.1
    assert abs(apg - data) < 0.03


def test_apg_stays_in_the_class():
    apg = list(ring_scene(20).values())[2]
    for number, of_class in enumerate(apg.chunk(8)):
        assert rings.RING.shares(of_class)[number] == 1


def test_a_threshold_limits_how_far_guidance_moves_a_prediction():
    x = rings.RING.draw(100, sigma=1.0)
    cond = mixtures.only(rings.RING, 0).denoised(x, 1.0)
    g = cond - rings.RING.denoised(x, 1.0)
    assert (g.norm(dim=1) > 0.5).any()
    assert projected_update(g, cond, eta=0.0, r=0.5).norm(dim=1).max() <= 0.5


def test_pag_repairs_pictures_that_fall_apart():
    """The perturbed prediction is the exact one of a model whose tokens see only themselves."""
    data, alone, pag = (tokens.coherent(x).double().mean().item() for x in token_scene(60).values())
    assert data == 1 and alone < 0.5 and pag > 0.85


def test_all_evidence_is_the_exact_denoiser():
    noise = torch.randn(60, tokens.TOKENS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = mixtures.heun(partial(tokens.denoised, share=1.0), 5 * noise, mixtures.edm_sigmas(24))
    assert tokens.coherent(x).all()


def test_the_pictures_are_drawn(tmp_path):
    trees.draw(tmp_path / "tree.png", tree_scene(500), ["no guidance", "CFG, w 4", "autoguidance, w 3"])
    rings.draw(tmp_path / "ring.png", ring_scene(20))
    tokens.draw(tmp_path / "tokens.png", token_scene(60))
    for name in ("tree", "ring", "tokens"):
        file = tmp_path / f"{name}.png"
        assert file.stat().st_size < 60_000
        with Image.open(file) as picture:
            assert picture.size == (900, 344)
