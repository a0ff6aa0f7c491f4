"""Cross-attention maps in the host: one attention call against the formulas, and what real sampling runs collect and mix."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import tools
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from lodestar.guiders.engine.choice import Choice
from lodestar.guiders.engine.keys import options_of
from lodestar.guiders.engine.plan import Policy
from lodestar.guiders.frecas.map_patches import AddedMaps, Chunks, MixedAttention, with_maps
from lodestar.guiders.frecas.maps import Maps
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.terms.pag import PAG


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- one call --------------------------------------------------------------------------------------------------------


def mixed(weight, use=None, collect=None, previous=None, q=None, k=None, v=None, keys=("a",), heads=2):
    """One layer's attention with maps."""
    attention = MixedAttention(Chunks(use, collect, keys, [collect is not None] * len(keys), None), weight, previous)
    return attention(q, k, v, {"activations_shape": [len(q), 8, 3, 4], "n_heads": heads, "attn_precision": None})


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_mixing_is_the_papers_formula(weight):
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
def test_one_layers_own_map_of_one_head_changes_nothing(weight):
    q, k, v = random(2, 12, 8), random(2, 5, 8, seed=1), random(2, 5, 8, seed=2)
    store = Maps()
    plain = mixed(weight, collect=store, q=q, k=k, v=v, heads=1)
    torch.testing.assert_close(mixed(weight, store, q=q, k=k, v=v, heads=1), plain, rtol=1e-5, atol=1e-5)


def test_another_packs_replacement_is_mixed_with():
    q, k, v = random(1, 12, 8), random(1, 5, 8, seed=1), random(1, 5, 8, seed=2)
    store = Maps()
    grid = random(1, 12, 5).softmax(-1)
    store.add("a", (3, 4), grid)
    out = mixed(0.25, store, previous=lambda q, k, v, extra: q * 7, q=q, k=k, v=v)
    torch.testing.assert_close(out, 0.75 * 7 * q + 0.25 * grid @ v)


def joint(q, k, v, use=None, collect=None, keys=("a",), weight=0.5, previous=None):
    """One joint attention with maps: 3 text tokens, then 2 x 4 of a picture."""
    attention = AddedMaps(Chunks(use, collect, keys, [collect is not None] * len(keys), None), weight, (2, 4), previous)
    return attention(optimized_attention, q, k, v, 2, transformer_options={})


def test_joint_attention_gets_the_authors_term():
    q, k, v = (random(4, 3 + 8, 8, seed=seed) for seed in range(3))
    store, grids = Maps(), random(2, 2, 8, 3, seed=3).softmax(-1)
    for key, grid in zip(("a", "b"), grids, strict=True):
        store.add(key, (2, 4), grid)
    split = lambda x: x.double().reshape(4, -1, 2, 4).transpose(1, 2)  # noqa: E731
    expected = ((split(q) @ split(k).mT / 2).softmax(-1) @ split(v)).transpose(1, 2).reshape(4, 11, 8)
    expected[:, 3:] += 0.5 * 3 * grids.flatten(0, 1).double() @ v[:, :3].double()
    torch.testing.assert_close(joint(q, k, v, store, keys=("a", "b")).double(), expected, rtol=1e-5, atol=1e-5)


def test_joint_maps_are_a_softmax_over_the_text_alone():
    q, k, v = (random(2, 3 + 8, 8, seed=seed) for seed in range(3))
    store = Maps()
    plain = joint(q, k, v, collect=store)
    split = lambda x: x.double().reshape(2, -1, 2, 4).transpose(1, 2)  # noqa: E731
    expected = (split(q)[:, :, 3:] @ split(k)[:, :, :3].mT / 2).softmax(-1).mean(1)
    torch.testing.assert_close(store.at("a", (2, 4), 3, q).double(), expected, rtol=1e-5, atol=1e-6)
    other = joint(q, k, v, store, previous=lambda func, *args, **kwargs: 7 * func(*args, **kwargs))
    torch.testing.assert_close(other - 7 * plain, joint(q, k, v, store) - plain, rtol=1e-4, atol=1e-5)


def test_other_attention_of_the_network_is_left_alone():
    """The picture's own attention (SD3.5 medium) and attention to something else."""
    q, k, v = (random(2, 8, 8, seed=seed) for seed in range(3))
    assert joint(q, k, v, collect=Maps()).equal(joint(q, k, v))
    k, v = (random(2, 11, 8, seed=seed) for seed in range(2))
    assert joint(q, k, v, collect=Maps()).equal(joint(q, k, v))


# --- in sampling runs ------------------------------------------------------------------------------------------------


def run(model, weight, use, collect, **more):
    """A sampling run of 4 steps with maps, and whether cross-attention was replaced in each of its forward passes."""
    seen = []

    def spy(executor, *args, **kwargs):
        options = options_of(args[2:], kwargs)
        seen.append(bool(options.get("patches_replace", {}).get("attn2")) or "optimized_attention_override" in options)
        return executor(*args, **kwargs)

    model = with_maps(tools.attach(model), weight, use, collect)
    result = tools.sample(tools.with_wrapper(model, WrappersMP.APPLY_MODEL, spy), steps=4, **more)
    return result, seen


LAYERS = {"unet": {(16, 16): 3, (8, 8): 5}, "mmdit": {(8, 8): 3}}


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde"])
@pytest.mark.parametrize("kind", LAYERS)
def test_maps_are_collected_in_the_last_evaluation_alone(kind, sampler):
    model, store = tools.tiny(kind), Maps()
    result, seen = run(model, 0.5, None, store, sampler=sampler)
    assert seen == [*[False] * (len(seen) - 1), True]
    assert result.equal(tools.sample(model, steps=4, sampler=sampler))
    assert [key[1] for key in store.layers] in ([("positive", 0), ("negative", 0)], [("negative", 0), ("positive", 0)])
    for rows in store.layers.values():
        (layers,) = rows.values()
        assert {size: count for size, (_, count) in layers.items()} == LAYERS[kind]
        for total, count in layers.values():
            torch.testing.assert_close(total.sum(1), torch.full_like(total[:, 0], count))


@pytest.mark.parametrize("kind", LAYERS)
def test_maps_are_mixed_in_every_evaluation_of_the_next_stage(kind):
    model, store = tools.tiny(kind), Maps()
    run(model, 0.5, None, store)
    latent = tools.empty_latent(model)[..., :1, :1].repeat(1, 1, 24, 32)
    result, seen = run(model, 0.5, store, None, latent=latent)
    assert all(seen) and result.isfinite().all()
    assert not tools.close(result, tools.sample(model, steps=4, latent=latent), 1e-3)


@pytest.mark.parametrize("kind", ["unet", "mmdit", "wan"])
def test_no_weight_or_no_cross_attention_is_no_patch(kind):
    model = tools.attach(tools.tiny(kind))
    assert with_maps(model, 0.0, Maps(), Maps()) is model
    assert with_maps(model, 0.5, None, None) is model
    assert (with_maps(model, 0.5, Maps(), None) is model) == (kind == "wan")


def test_maps_of_every_entry_and_branch():
    """Two prompts in areas of their own, texts of different lengths, a perturbed branch: each of the sampler's entries has its map."""
    model = tools.guided(tools.tiny("unet"), tools.pag(tools.tiny("unet")))
    positive = [*tools.cond(1, tokens=4, area=(16, 8, 0, 0), strength=1.0), *tools.cond(3, tokens=6, area=(16, 8, 0, 8), strength=1.0)]
    conds = {"positive": positive, "negative": tools.cond(2, tokens=8)}
    store = Maps()
    run(model, 0.5, None, store, **conds)
    collected = {key[1] for key in store.layers}
    assert collected == {("positive", 0), ("positive", 1), ("negative", 0)}
    assert {size for rows in store.layers.values() for size in rows[0]} == {(16, 16), (8, 8), (16, 8), (8, 4)}
    result, seen = run(model, 0.5, store, None, **conds)
    assert all(seen) and not tools.close(result, tools.sample(model, steps=4, **conds), 1e-3)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_perturbed_branch_uses_the_maps_of_the_positive_one(kind):
    """PAG measures what broken self-attention does, and not what the maps do: where nothing is broken the difference is 0."""
    model, store = tools.tiny(kind), Maps()
    run(model, 0.5, None, store)
    unbroken = tools.guided(model, PAG(perturbation=IdentityAttention(()), scale=3.0))
    assert tools.close(run(unbroken, 0.5, store, None)[0], run(model, 0.5, store, None)[0], 1e-4)


# --- where policies leave branches out -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stops(Policy):
    """Guides every image up to a step of its own."""

    name = "Stops"
    neutral = False
    steps: tuple[int, ...]

    def choose(self, step):
        rows = tuple(step.index <= last for last in self.steps)
        return Choice(uncond=rows if any(rows) else False)


def maps_of(store: Maps, name: str, row: int) -> dict[tuple[int, int], Tensor]:
    """The collected maps of one row of a branch by their size."""
    (key,) = [key for key in store.layers if key[1] == (name, 0)]
    return {size: total / count for size, (total, count) in store.layers[key][row].items()}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_row_that_a_policy_stops_keeps_the_maps_of_its_last_step(kind):
    """Two images that lose D_u after different steps: each map is the one that a run which ends there collects."""
    model, store, conds = tools.tiny(kind), Maps(), {"negative": tools.cond(2, tokens=8)}
    latent = tools.empty_latent(model, 2)
    run(tools.guided(model, Stops(steps=(0, 1))), 0.5, None, store, latent=latent, **conds)
    for row in (0, 1):
        expected = Maps()
        run(model, 0.5, None, expected, latent=latent, last_step=row + 1, **conds)
        for size, grid in maps_of(expected, "negative", row).items():
            torch.testing.assert_close(maps_of(store, "negative", row)[size], grid, rtol=1e-4, atol=1e-5)
        assert not tools.close(maps_of(store, "positive", row)[8, 8], maps_of(expected, "positive", row)[8, 8], 1e-3)
    size = latent.shape[-2] // (2 if kind == "mmdit" else 1), latent.shape[-1] // (2 if kind == "mmdit" else 1)
    for key in store.layers:
        assert len(store.at(key, size, 40, latent)) == 2


@pytest.mark.parametrize("kind", LAYERS)
def test_a_branch_without_maps_leaves_the_other_one_without_them(kind):
    """D_u that was never evaluated: maps in D_c alone would come back enlarged by the guidance."""
    model, store = tools.tiny(kind), Maps()
    run(tools.guided(model, Stops(steps=(-1,))), 0.5, None, store)
    assert {key[1][0] for key in store.layers} == {"positive"}
    guided, seen = run(model, 0.5, store, None)
    assert guided.equal(tools.sample(model, steps=4)) and not any(seen)
    alone, seen = run(model, 0.5, store, None, cfg=1.0)
    assert not tools.close(alone, tools.sample(model, steps=4, cfg=1.0), 1e-3) and all(seen)


def test_an_interrupted_run_leaves_nothing():
    model, store = tools.tiny("unet"), Maps()
    run(model, 0.5, None, store)
    expected = run(model, 0.5, store, None)[0]

    def interrupt(*_):
        raise tools.comfy.model_management.InterruptProcessingException

    with pytest.raises(tools.comfy.model_management.InterruptProcessingException):
        run(model, 0.5, store, None, callback=interrupt)
    assert run(model, 0.5, store, None)[0].equal(expected)
