"""Cross-attention maps: their maths against float64 rewrites, and what is collected and mixed in real sampling runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lodestar.guiders.frecas import maps
from lodestar.guiders.frecas.maps import Maps, attention_map, average, enlarged, with_tokens


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_map(height: int, width: int, tokens: int = 5, batch: int = 2, seed: int = 0) -> Tensor:
    """A map [B, T, h, w] whose rows over T sum to 1."""
    return random(batch, tokens, height, width, seed=seed).softmax(1)


# --- the maths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logits", [maps._LOGITS, 64])
def test_a_map_is_the_mean_over_heads_of_the_softmax(monkeypatch, logits):
    monkeypatch.setattr(maps, "_LOGITS", logits)
    q, k, heads = random(2, 12, 8), random(2, 5, 8, seed=1), 2
    expected = torch.zeros(2, 12, 5, dtype=torch.float64)
    for head in range(heads):
        part = slice(4 * head, 4 * head + 4)
        expected += torch.softmax(q[..., part].double() @ k[..., part].double().mT / 2, dim=-1) / heads
    torch.testing.assert_close(attention_map(q, k, heads).double(), expected, rtol=1e-5, atol=1e-6)


def test_rows_sum_to_1_and_stay_so():
    ones = lambda grid: torch.testing.assert_close(grid.sum(1), torch.ones_like(grid[:, 0]))  # noqa: E731
    torch.testing.assert_close(attention_map(random(2, 12, 8), random(2, 5, 8), 2).sum(-1), torch.ones(2, 12))
    for size in [(8, 12), (4, 6), (7, 5), (2, 3)]:
        ones(enlarged(a_map(4, 6), *size))
    ones(average({(4, 6): (a_map(4, 6) * 2, 2), (2, 3): (a_map(2, 3, seed=1), 1)}))
    ones(with_tokens(a_map(4, 6, 6), 3))
    ones(with_tokens(a_map(4, 6, 3), 12))


def test_maps_are_enlarged_in_two_dimensions():
    """What looks at the left half looks at the left half afterwards. Along the flattened queries, every row would hold half a row."""
    grid = torch.zeros(1, 2, 4, 6)
    grid[:, 0, :, :3] = grid[:, 1, :, 3:] = 1
    large = enlarged(grid, 8, 12)
    assert large[:, 0, :, :5].eq(1).all() and large[:, 0, :, 7:].eq(0).all()
    flat = torch.nn.functional.interpolate(grid.flatten(2), size=96, mode="linear").reshape(1, 2, 8, 12)
    assert flat[0, 0, 1].mean() < 0.1 < 0.9 < flat[0, 0, 0].mean()


def test_layers_of_one_size_are_averaged_before_the_sizes():
    large, small = a_map(4, 6), a_map(2, 3, seed=1)
    expected = (large + enlarged(small, 4, 6)) / 2
    torch.testing.assert_close(average({(2, 3): (small, 1), (4, 6): (large * 3, 3)}), expected)


def test_a_repeated_text_shares_the_weights():
    """The host pads the shorter text of a fused call with copies of itself, which does not change attention."""
    q, k, v = random(1, 12, 8), random(1, 3, 8, seed=1), random(1, 3, 8, seed=2)
    grid = attention_map(q, k, 1)
    as_grid = grid.mT.reshape(1, 3, 3, 4)
    twice = with_tokens(as_grid, 6).flatten(2).mT
    torch.testing.assert_close(twice, attention_map(q, k.repeat(1, 2, 1), 1))
    torch.testing.assert_close(twice @ v.repeat(1, 2, 1), grid @ v)
    torch.testing.assert_close(with_tokens(with_tokens(as_grid, 6), 3), as_grid)
    assert with_tokens(as_grid, 4) is None


def test_maps_are_kept_apart_and_cleared():
    store = Maps()
    for key in ("a", "b"):
        store.add(key, (2, 3), torch.full((1, 6, 4), 0.25 if key == "a" else 0.5))
    like = torch.zeros(1, dtype=torch.float16)
    assert store.at("a", (4, 6), 4, like).shape == (1, 24, 4) and store.at("a", (4, 6), 4, like).dtype == torch.float16
    assert store.at("a", (4, 6), 4, like) is store.at("a", (4, 6), 4, like)
    assert store.at("b", (2, 3), 4, like).eq(0.5).all()
    assert store.at("c", (2, 3), 4, like) is None
    store.clear()
    assert store.at("a", (4, 6), 4, like) is None


# --- in the host -----------------------------------------------------------------------------------------------------


def mixed(weight, use=None, collect=None, previous=None, q=None, k=None, v=None, keys=("a",), heads=2):
    """One layer's attention with maps."""
    attention = maps._MixedAttention(maps.Chunks(use, collect, keys, [collect is not None] * len(keys), None), weight, previous)
    return attention(q, k, v, {"activations_shape": [len(q), 8, 3, 4], "n_heads": heads, "attn_precision": None})


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_mixing_is_the_papers_formula(host, weight):
    q, k, v = random(4, 12, 8), random(4, 5, 8, seed=1), random(4, 5, 8, seed=2)
    store = Maps()
    grids = random(2, 2, 12, 5, seed=3).softmax(-1)
    for key, grid in zip(("a", "b"), grids, strict=True):
        store.add(key, (3, 4), grid)
    out = mixed(weight, store, q=q, k=k, v=v, keys=("a", "b"))
    split = lambda x: x.double().reshape(4, -1, 2, 4).transpose(1, 2)  # noqa: E731
    plain = (split(q) @ split(k).mT / 2).softmax(-1) @ split(v)
    expected = (1 - weight) * plain.transpose(1, 2).reshape(4, 12, 8) + weight * grids.flatten(0, 1).double() @ v.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_one_layers_own_map_of_one_head_changes_nothing(host, weight):
    q, k, v = random(2, 12, 8), random(2, 5, 8, seed=1), random(2, 5, 8, seed=2)
    store = Maps()
    plain = mixed(weight, collect=store, q=q, k=k, v=v, heads=1)
    torch.testing.assert_close(mixed(weight, store, q=q, k=k, v=v, heads=1), plain, rtol=1e-5, atol=1e-5)


def test_another_packs_replacement_is_mixed_with(host):
    q, k, v = random(1, 12, 8), random(1, 5, 8, seed=1), random(1, 5, 8, seed=2)
    store = Maps()
    grid = random(1, 12, 5).softmax(-1)
    store.add("a", (3, 4), grid)
    out = mixed(0.25, store, previous=lambda q, k, v, extra: q * 7, q=q, k=k, v=v)
    torch.testing.assert_close(out, 0.75 * 7 * q + 0.25 * grid @ v)


def joint(q, k, v, use=None, collect=None, keys=("a",), weight=0.5, previous=None):
    """One joint attention with maps: 3 text tokens, then 2 x 4 of a picture."""
    from comfy.ldm.modules.attention import optimized_attention

    attention = maps._AddedMaps(maps.Chunks(use, collect, keys, [collect is not None] * len(keys), None), weight, (2, 4), previous)
    return attention(optimized_attention, q, k, v, 2, transformer_options={})


def test_joint_attention_gets_the_authors_term(host):
    q, k, v = (random(4, 3 + 8, 8, seed=seed) for seed in range(3))
    store, grids = Maps(), random(2, 2, 8, 3, seed=3).softmax(-1)
    for key, grid in zip(("a", "b"), grids, strict=True):
        store.add(key, (2, 4), grid)
    split = lambda x: x.double().reshape(4, -1, 2, 4).transpose(1, 2)  # noqa: E731
    expected = ((split(q) @ split(k).mT / 2).softmax(-1) @ split(v)).transpose(1, 2).reshape(4, 11, 8)
    expected[:, 3:] += 0.5 * 3 * grids.flatten(0, 1).double() @ v[:, :3].double()
    torch.testing.assert_close(joint(q, k, v, store, keys=("a", "b")).double(), expected, rtol=1e-5, atol=1e-5)


def test_joint_maps_are_a_softmax_over_the_text_alone(host):
    q, k, v = (random(2, 3 + 8, 8, seed=seed) for seed in range(3))
    store = Maps()
    plain = joint(q, k, v, collect=store)
    split = lambda x: x.double().reshape(2, -1, 2, 4).transpose(1, 2)  # noqa: E731
    expected = (split(q)[:, :, 3:] @ split(k)[:, :, :3].mT / 2).softmax(-1).mean(1)
    torch.testing.assert_close(store.at("a", (2, 4), 3, q).double(), expected, rtol=1e-5, atol=1e-6)
    other = joint(q, k, v, store, previous=lambda func, *args, **kwargs: 7 * func(*args, **kwargs))
    torch.testing.assert_close(other - 7 * plain, joint(q, k, v, store) - plain, rtol=1e-4, atol=1e-5)


def test_other_attention_of_the_network_is_left_alone(host):
    """The picture's own attention (SD3.5 medium) and attention to something else."""
    q, k, v = (random(2, 8, 8, seed=seed) for seed in range(3))
    assert joint(q, k, v, collect=Maps()).equal(joint(q, k, v))
    k, v = (random(2, 11, 8, seed=seed) for seed in range(2))
    assert joint(q, k, v, collect=Maps()).equal(joint(q, k, v))


def run(model, weight, use, collect, **more):
    """A sampling run of 4 steps with maps, and whether cross-attention was replaced in each of its forward passes."""
    import tools
    from comfy.patcher_extension import WrappersMP

    seen = []

    def spy(executor, *args, **kwargs):
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[5]
        seen.append(bool(options.get("patches_replace", {}).get("attn2")) or "optimized_attention_override" in options)
        return executor(*args, **kwargs)

    model = maps.with_maps(tools.attach(model), weight, use, collect)
    result = tools.sample(tools.with_wrapper(model, WrappersMP.APPLY_MODEL, spy), steps=4, **more)
    return result, seen


LAYERS = {"unet": {(16, 16): 3, (8, 8): 5}, "mmdit": {(8, 8): 3}}


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde"])
@pytest.mark.parametrize("kind", LAYERS)
def test_maps_are_collected_in_the_last_evaluation_alone(host, kind, sampler):
    import tools

    model, store = tools.tiny(kind), Maps()
    result, seen = run(model, 0.5, None, store, sampler=sampler)
    assert seen == [*[False] * (len(seen) - 1), True]
    assert result.equal(tools.sample(model, steps=4, sampler=sampler))
    assert [key[1] for key in store._layers] in ([("positive", 0), ("negative", 0)], [("negative", 0), ("positive", 0)])
    for layers in store._layers.values():
        assert {size: count for size, (_, count) in layers.items()} == LAYERS[kind]
        for total, count in layers.values():
            torch.testing.assert_close(total.sum(1), torch.full_like(total[:, 0], count))


@pytest.mark.parametrize("kind", LAYERS)
def test_maps_are_mixed_in_every_evaluation_of_the_next_stage(host, kind):
    import tools

    model, store = tools.tiny(kind), Maps()
    run(model, 0.5, None, store)
    latent = tools.empty_latent(model)[..., :1, :1].repeat(1, 1, 24, 32)
    result, seen = run(model, 0.5, store, None, latent=latent)
    assert all(seen) and result.isfinite().all()
    assert not tools.close(result, tools.sample(model, steps=4, latent=latent), 1e-3)


@pytest.mark.parametrize("kind", ["unet", "mmdit", "wan"])
def test_no_weight_or_no_cross_attention_is_no_patch(host, kind):
    import tools

    model = tools.attach(tools.tiny(kind))
    assert maps.with_maps(model, 0.0, Maps(), Maps()) is model
    assert maps.with_maps(model, 0.5, None, None) is model
    assert (maps.with_maps(model, 0.5, Maps(), None) is model) == (kind == "wan")


def test_maps_of_every_entry_and_branch(host):
    """Two prompts in areas of their own, texts of different lengths, a perturbed branch: each of the sampler's entries has its map."""
    import tools

    model = tools.guided(tools.tiny("unet"), tools.pag(tools.tiny("unet")))
    positive = [*tools.cond(1, tokens=4, area=(16, 8, 0, 0), strength=1.0), *tools.cond(3, tokens=6, area=(16, 8, 0, 8), strength=1.0)]
    conds = {"positive": positive, "negative": tools.cond(2, tokens=8)}
    store = Maps()
    run(model, 0.5, None, store, **conds)
    collected = {key[1] for key in store._layers}
    assert collected == {("positive", 0), ("positive", 1), ("negative", 0)}
    assert {size for layers in store._layers.values() for size in layers} == {(16, 16), (8, 8), (16, 8), (8, 4)}
    result, seen = run(model, 0.5, store, None, **conds)
    assert all(seen) and not tools.close(result, tools.sample(model, steps=4, **conds), 1e-3)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_perturbed_branch_uses_the_maps_of_the_positive_one(host, kind):
    """PAG measures what broken self-attention does, and not what the maps do: where nothing is broken the difference is 0."""
    import tools

    from lodestar.guiders.network.identity_attention import IdentityAttention
    from lodestar.guiders.terms.pag import PAG

    model, store = tools.tiny(kind), Maps()
    run(model, 0.5, None, store)
    unbroken = tools.guided(model, PAG(perturbation=IdentityAttention(()), scale=3.0))
    assert tools.close(run(unbroken, 0.5, store, None)[0], run(model, 0.5, store, None)[0], 1e-4)


def test_an_interrupted_run_leaves_nothing(host):
    import tools

    model, store = tools.tiny("unet"), Maps()
    run(model, 0.5, None, store)
    expected = run(model, 0.5, store, None)[0]

    def interrupt(*_):
        raise tools.comfy.model_management.InterruptProcessingException

    with pytest.raises(tools.comfy.model_management.InterruptProcessingException):
        run(model, 0.5, store, None, callback=interrupt)
    assert run(model, 0.5, store, None)[0].equal(expected)
