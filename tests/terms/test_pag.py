"""PAG's algebra, against diffusers and against the host's own node, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lodestar.guiders.engine.step import Step
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.network.layers import resolve_layers
from lodestar.guiders.network.masked_attention import masked_attention
from lodestar.guiders.spaces import Layout
from lodestar.guiders.terms.pag import PAG, rescaled

NOTHING = IdentityAttention(())
SHAPES = [(3, 4, 20), (3, 4, 8, 8), (3, 4, 3, 6, 5)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def guided(denoised: Tensor, cond: Tensor, perturbed: Tensor, s: float, rescale: float = 0.0, layout: Layout | None = None) -> Tensor:
    """D + s (D_c - D_p)."""
    rule = PAG(perturbation=NOTHING, scale=s, rescale=rescale)
    return rule.add(denoised, cond, {rule.branches[0]: perturbed}, Step(0, 1.0, True, layout or Layout()))


# --- the invariants, without a host ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("s", [0.0, 1.5, 3.0, 4.5])
def test_it_adds_to_cfg(shape, s):
    """The weights of the three predictions: w + s, 1 - w and -s."""
    w, predictions = 4.0, torch.stack([random(*shape, seed=i) for i in range(3)])
    expected = torch.tensordot(torch.tensor([w + s, 1 - w, -s], dtype=torch.float64), predictions, dims=1)
    cond, uncond, perturbed = predictions
    torch.testing.assert_close(guided(uncond.lerp(cond, w), cond, perturbed, s), expected)


@pytest.mark.parametrize("s", [0.0, 1.0, 5.0])
def test_alone_it_extrapolates_from_the_perturbed_prediction(s):
    cond, perturbed = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1)
    torch.testing.assert_close(guided(cond, cond, perturbed, s), perturbed + (s + 1) * (cond - perturbed))


def test_noise_space_gives_the_same():
    x, sigma = random(3, 4, 8, 8, seed=3), 2.5
    base, cond, perturbed = (random(3, 4, 8, 8, seed=i) for i in range(3))
    noise = lambda denoised: (x - denoised) / sigma  # noqa: E731
    in_noise = noise(base) + 3 * (noise(cond) - noise(perturbed))
    torch.testing.assert_close(x - sigma * in_noise, guided(base, cond, perturbed, 3.0))


def test_a_perturbation_without_effect_guides_nowhere():
    base, cond = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1)
    assert guided(base, cond, cond, 100.0).equal(base)


def test_scale_0_is_off():
    assert PAG(perturbation=NOTHING, scale=0.0).neutral and not PAG(perturbation=NOTHING).neutral


def test_one_token_attends_to_itself_anyway():
    q, k, v = (random(2, 4, 1, 8, seed=i) for i in range(3))
    ordinary = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ordinary, v)
    torch.testing.assert_close(masked_attention(q, k, v, slice(0, 1)), v)


def test_one_image_token_and_text_is_ordinary_attention():
    q, k, v = (random(2, 4, 1 + 5, 8, seed=i) for i in range(3))
    ordinary = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(masked_attention(q[:, :, 5:], k, v, slice(5, 6)), ordinary[:, :, 5:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("amount", [0.0, 0.3, 1.0])
def test_rescale_pulls_each_samples_contrast_to_that_of_the_conditional_prediction(shape, amount):
    sizes = torch.tensor([1.0, 3.0, 9.0]).reshape(-1, *[1] * (len(shape) - 1))
    cond, high = random(*shape), random(*shape, seed=1) * sizes.double()
    out = rescaled(high, cond, amount, Layout())
    for i in range(3):
        ratio = amount * cond[i].std() / high[i].std() + 1 - amount
        torch.testing.assert_close(out[i], high[i] * ratio)
    assert amount or out is high


def test_rescale_measures_parts_of_a_packed_latent_apart():
    shapes = [(2, 4, 6), (2, 8, 10)]
    pack = lambda parts: torch.cat([part.flatten(1) for part in parts], 1).unsqueeze(1)  # noqa: E731
    cond, high = [random(*shape) for shape in shapes], [random(*shape, seed=1) * 5 for shape in shapes]
    out = rescaled(pack(high), pack(cond), 1.0, Layout.of(shapes))
    torch.testing.assert_close(out, pack([rescaled(a, b, 1.0, Layout()) for a, b in zip(high, cond, strict=True)]))


def test_rescale_of_a_constant_prediction_is_finite():
    assert rescaled(torch.ones(2, 4, 8, 8), random(2, 4, 8, 8, dtype=torch.float32), 1.0, Layout()).isfinite().all()


# --- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.5, 3.0, 5.0])
def test_equals_diffusers(s):
    """With CFG their scale is s. Without CFG it is s + 1, or s in their original formulation."""
    from diffusers.guiders import PerturbedAttentionGuidance

    cond, uncond, perturbed = (random(3, 4, 8, 8, seed=i) for i in range(3))

    def theirs(scale: float, cfg: float, original: bool = False) -> Tensor:
        guider = PerturbedAttentionGuidance(cfg, scale, 0.0, 1.0, perturbed_guidance_layers=[0], use_original_formulation=original)
        return guider.forward(cond, uncond, perturbed).pred

    torch.testing.assert_close(theirs(s, 4.0), guided(uncond.lerp(cond, 4.0), cond, perturbed, s))
    torch.testing.assert_close(theirs(s, 3.0, True), guided(uncond.lerp(cond, 4.0), cond, perturbed, s))
    torch.testing.assert_close(theirs(s + 1, 1.0), guided(cond, cond, perturbed, s))
    torch.testing.assert_close(theirs(s, 0.0, True), guided(cond, cond, perturbed, s))


# --- the host --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "unet_v"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_equals_the_hosts_node(host, kind, cfg):
    """The same block. Theirs makes a second call of the model for it, ours none."""
    import tools
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    model = tools.tiny(kind)
    with tools.counted(model) as their_rows:
        theirs = tools.sample(PerturbedAttentionGuidance.execute(model, 2.0)[0], cfg=cfg, steps=10)
    with tools.counted(model) as rows:
        ours = tools.sample(tools.guided(model, tools.pag(model, 2.0)), cfg=cfg, steps=10)
    assert tools.close(ours, theirs)
    assert not tools.close(ours, tools.sample(model, cfg=cfg, steps=10), 1e-2)
    branches = 2 if cfg == 1 else 3
    assert rows == [branches] * 10 and sum(their_rows) == sum(rows)


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_scale_0_costs_nothing_and_changes_no_bit(host, kind):
    import tools

    model = tools.tiny(kind)
    plain = tools.sample(model)
    with tools.counted(model) as rows:
        assert tools.sample(tools.guided(model, tools.pag(model, 0.0))).equal(plain)
    assert rows == [2] * 6


def test_no_layers_guide_nowhere(host):
    import tools

    model = tools.tiny("unet")
    guided_model = tools.guided(model, PAG(perturbation=NOTHING, scale=9.0))
    assert tools.close(tools.sample(guided_model, steps=3), tools.sample(model, steps=3), 1e-4)


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_the_model_itself_is_left_as_it_was(host, kind):
    import tools

    model = tools.tiny(kind)
    before = tools.sample(model)
    tools.sample(tools.guided(model, tools.pag(model)))
    assert tools.sample(model).equal(before)


@pytest.mark.parametrize(("cfg", "inside"), [(4.0, 3), (1.0, 2)])
def test_outside_its_window_it_costs_nothing(host, cfg, inside):
    import tools

    model = tools.tiny("unet")
    with tools.counted(model) as rows:
        tools.sample(tools.guided(model, tools.pag(model, start_percent=0.3, end_percent=0.6)), cfg=cfg, steps=10)
    assert set(rows) == {inside - 1, inside}


def test_the_perturbed_prediction_does_not_depend_on_queries_and_keys(host):
    import tools

    def update(model: object) -> Tensor:
        seen = []
        guided_model = tools.guided(model, tools.pag(model))
        guided_model.set_model_sampler_post_cfg_function(
            lambda args: seen.append(args["cond_denoised"] - (args["denoised"] - args["cond_denoised"]) / 2) or args["denoised"]
        )
        tools.sample(guided_model, cfg=1.0, steps=1)
        return seen[0]

    model, other = tools.tiny("unet"), tools.tiny("unet")
    for transformer in other.model.diffusion_model.middle_block[1].transformer_blocks:
        for weights in (transformer.attn1.to_q.weight, transformer.attn1.to_k.weight):
            weights.data = weights.data.flip(0) * 3
    assert not tools.close(tools.sample(other, steps=1), tools.sample(model, steps=1), 1e-4)
    assert tools.close(update(other), update(model), 1e-4)


# --- other nodes on self-attention -----------------------------------------------------------------------------------


def tiling(model: object, max_depth: int = 0) -> object:
    """The host's HyperTile: tiles of 32 pixels."""
    from comfy_extras.nodes_hypertile import HyperTile

    return HyperTile.execute(model, 32, 1, max_depth, False)[0]


def merging(model: object) -> object:
    """The host's token merging, in the layers at the latent's own size."""
    from comfy_extras.nodes_tomesd import TomePatchModel

    return TomePatchModel.execute(model, 0.5)[0]


@pytest.mark.parametrize("patched, owner", [(tiling, "HyperTile"), (merging, "TomePatchModel")])
@pytest.mark.parametrize("first", [True, False])
def test_nodes_that_change_the_queries_alone_are_refused(host, patched, owner, first):
    """Before, the perturbation had no effect there and was paid for."""
    import tools

    layers = resolve_layers(tools.tiny("unet"), "input:1")
    rule = PAG(perturbation=IdentityAttention(layers), scale=2.0)
    model = tools.tiny("unet")
    model = tools.guided(patched(model), rule) if first else patched(tools.guided(model, rule))
    with pytest.raises(ValueError, match=rf"^PAG \(Perturbed-Attention Guidance\) and {owner} do not go together in the layer input:1: "):
        tools.sample(model, steps=2)
    neutral = tools.guided(patched(tools.tiny("unet")), PAG(perturbation=IdentityAttention(layers), scale=0.0))
    torch.manual_seed(0)
    result = tools.sample(neutral, steps=2)
    torch.manual_seed(0)
    assert result.equal(tools.sample(patched(tools.tiny("unet")), steps=2))


@pytest.mark.parametrize("patched", [tiling, merging])
def test_nodes_that_change_other_layers_go_together(host, patched, monkeypatch):
    """PAG in the middle block, tiles or merged tokens outside of it: as the unfused reference."""
    import tools

    monkeypatch.setattr(torch, "randint", lambda *_, size, **more: torch.zeros(size, dtype=torch.int64))  # merged alike in any batch
    rule = tools.pag(tools.tiny("unet"))
    ours = tools.sample(tools.guided(patched(tools.tiny("unet")), rule), steps=3)
    theirs = tools.sample(tools.reference(patched(tools.tiny("unet")), rule), steps=3)
    assert tools.close(ours, theirs)
    assert not tools.close(ours, tools.sample(tools.guided(tools.tiny("unet"), rule), steps=3), 1e-3)
