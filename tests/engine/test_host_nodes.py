"""The host's own model patches together with ours, and what other packs' functions get to see."""

from __future__ import annotations

import uuid

import pytest
import tools
import torch
from conditioning_tools import node
from tools import WrappersMP, close, comfy, counted, empty_latent, guided, pag, reference, sample, tiny

from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance

STEPS = 4


def run(model, **more):
    return sample(model, **{"steps": STEPS, "latent": empty_latent(model, 1, 8)} | more)


SKIP = {"scale": 2.0, "start_percent": 0.0, "end_percent": 1.0, "double_layers": "1", "single_layers": ""}
SKIP_SIMPLE = {name: value for name, value in SKIP.items() if name != "scale"}
CACHE = {"reuse_threshold": 3.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
FREE_U = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
POST = [
    node("nodes_cfg", "CFGZeroStar"),
    node("nodes_cfg", "CFGNorm", strength=0.8),
    node("nodes_mahiro", "Mahiro"),
    node("nodes_eps", "EpsilonScaling", scaling_factor=1.05),
    node("nodes_eps", "TemporalScoreRescaling", tsr_k=0.7, tsr_sigma=1.0),
    node("nodes_pag", "PerturbedAttentionGuidance", scale=2.0),
    node("nodes_sag", "SelfAttentionGuidance", scale=0.5, blur_sigma=2.0),
    node("nodes_slg", "SkipLayerGuidanceDiT", **SKIP),
]
PRE = [
    node("nodes_fresca", "FreSca", scale_low=1.0, scale_high=1.8, freq_cutoff=2),
    node("nodes_tcfg", "TCFG"),
    node("nodes_apg", "APG", eta=0.5, norm_threshold=2.0, momentum=0.0),
]
NETWORK = [
    node("nodes_slg", "SkipLayerGuidanceDiTSimple", **SKIP_SIMPLE),
    node("nodes_nag", "NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5),
    node("nodes_freelunch", "FreeU", **FREE_U),
    node("nodes_freelunch", "FreeU_V2", **FREE_U),
    node("nodes_hypertile", "HyperTile", tile_size=32, swap_size=1, max_depth=0, scale_depth=False),
]
WEIGHT = [node("nodes_custom_sampler", "CFGOverride", since="0.24.0", cfg=2.0, start_percent=0.0, end_percent=0.6)]
CACHES = [
    node("nodes_easycache", "EasyCacheNode", **CACHE),
    node("nodes_easycache", "LazyCacheNode", **CACHE),
]
CONFLICTS = [
    node("nodes_model_advanced", "RescaleCFG", multiplier=0.7),
    node("nodes_cfg", "CFGNorm", since="0.24.0", strength=0.8, pre_cfg=True),
    node("nodes_lumina2", "RenormCFG", cfg_trunc=100.0, renorm_cfg=1.0),
    node("nodes_perpneg", "PerpNeg", empty_conditioning=tools.cond(3), neg_scale=1.0),
]


def kind_for(patch) -> str:
    return "mmdit" if patch.__name__.startswith("SkipLayer") else "unet"


def terms(kind):
    return tools.all_rules(kind)[1:]


# --- together --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [*POST, *PRE, *NETWORK, *WEIGHT, *CACHES], ids=lambda patch: patch.__name__)
def test_both_orders_work_and_keep_the_other_nodes_effect(patch):
    kind, steps = kind_for(patch), 10 if patch in CACHES else STEPS
    model, rules = tiny(kind), tools.all_rules(kind)
    ours, theirs = run(guided(model, *rules), steps=steps), run(patch(model), steps=steps)
    for both in (guided(patch(model), *rules), patch(guided(model, *rules))):
        result = run(both, steps=steps)
        assert torch.isfinite(result).all()
        assert not close(result, ours, 1e-3), "the other node has no effect"
        assert not close(result, theirs, 1e-3), "our nodes have no effect"


@pytest.mark.parametrize("patch", [*POST, *NETWORK, *WEIGHT], ids=lambda patch: patch.__name__)
def test_another_node_after_ours(patch):
    """Equal to the host alone, with our guidance written as a post-CFG function before the node."""
    kind = kind_for(patch)
    model, rules = tiny(kind), tools.all_rules(kind)
    assert close(run(patch(guided(model, *rules))), run(patch(reference(model, *rules))), 5e-4)


@pytest.mark.parametrize("patch", [*POST, *NETWORK, *WEIGHT, *CONFLICTS], ids=lambda patch: patch.__name__)
def test_another_node_before_our_terms(patch):
    kind = kind_for(patch)
    model, rules = tiny(kind), terms(kind)
    assert close(run(guided(patch(model), *rules)), run(reference(patch(model), *rules)), 5e-4)


@pytest.mark.parametrize("patch", PRE, ids=lambda patch: patch.__name__)
def test_pre_cfg_functions_run_before_our_shapers(patch):
    model = tiny("unet")
    expected = run(reference(patch(model), APG()))
    assert close(run(guided(patch(model), APG())), expected, 5e-4)
    assert close(run(patch(guided(model, APG()))), expected, 5e-4)


@pytest.mark.parametrize("patch", [*POST, *PRE, *NETWORK, *WEIGHT, *CACHES, *CONFLICTS], ids=lambda patch: patch.__name__)
def test_neutral_settings_change_nothing(patch):
    kind = kind_for(patch)
    model, rules = tiny(kind), tools.neutral_rules(kind)
    expected = run(patch(model))
    assert torch.equal(run(guided(patch(model), *rules)), expected)
    assert torch.equal(run(patch(guided(model, *rules))), expected)


@pytest.mark.parametrize("patch", CONFLICTS, ids=lambda patch: patch.__name__)
def test_two_cfg_functions_are_an_error_that_names_both(patch):
    model = tiny("unet")
    name = patch.__name__.split()[0]
    with pytest.raises(ValueError, match=name) as at_node:
        guided(patch(model), APG())
    both = patch(guided(model, APG()))
    with counted(model) as rows, pytest.raises(ValueError, match=name) as at_start:
        run(both)
    assert rows == []
    assert APG.name in str(at_node.value)
    assert str(at_node.value) == str(at_start.value)


def test_our_pag_is_the_hosts_pag():
    model = tiny("unet")
    theirs = node("nodes_pag", "PerturbedAttentionGuidance", scale=3.0)(model)
    ours = guided(model, tools.PAG(perturbation=tools.IdentityAttention(tools.resolve_layers(model, "middle")), scale=3.0))
    latent = empty_latent(model, 1, 8)
    assert close(sample(ours, steps=10, latent=latent), sample(theirs, steps=10, latent=latent), 2e-4)


def test_cfg_override_decides_the_weight_that_apg_uses():
    """An override to 1 is no CFG: no unconditional rows, and nothing for APG to shape."""
    model = tiny("unet")
    override = node("nodes_custom_sampler", "CFGOverride", since="0.24.0", cfg=1.0, start_percent=0.0, end_percent=1.0)
    expected = run(model, cfg=1.0)
    for both in (override(guided(model, APG())), guided(override(model), APG())):
        with counted(model) as rows:
            assert torch.equal(run(both), expected)
        assert rows == [1] * STEPS


def test_interval_and_override_share_the_weight():
    model = tiny("unet")
    override = node("nodes_custom_sampler", "CFGOverride", since="0.24.0", cfg=2.0, start_percent=0.0, end_percent=0.5)
    with counted(model) as rows:
        run(guided(override(model), GuidanceInterval(end_percent=0.5)))
    assert set(rows) == {1, 2}


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "wan"])
def test_easycache_decides_and_predicts_as_without_us(kind):
    """A term too weak to move anything: then every prediction has to be the one without it, on skipped steps as well."""
    model = tiny(kind)
    network = model.model.diffusion_model
    first_layer = network.patch_embedding if kind == "wan" else network.time_embed
    latent = torch.zeros(1, 16, 2, 4, 4) if kind == "wan" else empty_latent(model, 1, 8)
    cached = node("nodes_easycache", "EasyCacheNode", **CACHE)(model)
    evaluated, predicted = [], []
    for main in (cached, guided(cached, pag(model, scale=1e-30))):
        calls, predictions = [], []
        probe = main.clone()
        probe.set_model_sampler_post_cfg_function(
            lambda args, keep=predictions: (keep.extend((args["cond_denoised"], args["uncond_denoised"])), args["denoised"])[1]
        )
        handle = first_layer.register_forward_pre_hook(lambda *_, calls=calls, predictions=predictions: calls.append(len(predictions)))
        sample(probe, steps=10, latent=latent)
        handle.remove()
        evaluated.append(calls)
        predicted.append(predictions)
    assert evaluated[0] == evaluated[1]
    assert 1 < len(evaluated[0]) < 10
    assert all(close(ours, plain) for plain, ours in zip(*predicted, strict=True))


# --- what others see -------------------------------------------------------------------------------------------------


def test_others_see_the_labels_they_would_see_without_us():
    seen: dict[str, list] = {}

    def note(place, options):
        seen.setdefault(place, []).append(list(options["cond_or_uncond"]))

    def replaced(q, k, v, extra):
        note("patches_replace", extra)
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])

    def wrapped(executor, *args, **kwargs):
        note("apply_model", args[5])
        return executor(*args, **kwargs)

    def inside(executor, *args, **kwargs):
        note("diffusion_model", kwargs.get("transformer_options") or args[-1])
        return executor(*args, **kwargs)

    def around(apply_model, args):
        note("model_function_wrapper", args)
        note("its options", args["c"]["transformer_options"])
        return apply_model(args["input"], args["timestep"], **args["c"])

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x, t, cond, batched_number, transformer_options):
            note("ControlNet", transformer_options)
            assert batched_number == len(transformer_options["cond_or_uncond"])

        def get_models(self):
            return []

    model = tiny("unet")

    def with_everything(model):
        clone = tools.with_wrapper(model, WrappersMP.APPLY_MODEL, wrapped)
        clone = tools.with_wrapper(clone, WrappersMP.DIFFUSION_MODEL, inside)
        clone.set_model_attn1_patch(lambda q, k, v, extra: (note("attn1_patch", extra), (q, k, v))[1])
        clone.set_model_attn2_patch(lambda q, k, v, extra: (note("attn2_patch", extra), (q, k, v))[1])
        clone.set_model_attn1_output_patch(lambda out, extra: (note("attn1_output", extra), out)[1])
        clone.set_model_attn2_replace(replaced, "middle", 0)
        clone.set_model_attn1_replace(replaced, "input", 1)
        clone.set_model_unet_function_wrapper(around)
        return clone

    control = Control()
    conds = {"positive": tools.cond(1, control=control), "negative": tools.cond(2, control=control)}
    plain = run(with_everything(model), **conds)
    without_us = {place: set(map(tuple, labels)) for place, labels in seen.items()}
    assert len(without_us) == 9
    assert set().union(*without_us.values()) == {(1, 0)}
    for main in (guided(with_everything(model), pag(model, 1e-30)), with_everything(guided(model, pag(model, 1e-30)))):
        seen.clear()
        assert close(run(main, **conds), plain)
        assert set(seen) == set(without_us)
        assert {tuple(labels) for place in seen.values() for labels in place} <= {(1, 0, 0), (1, 0)}


@pytest.mark.parametrize("kind", tools.KINDS)
def test_every_chunk_has_a_stable_uuid_of_its_own(kind):
    seen = []

    def note(executor, *args, **kwargs):
        seen.append(list(args[5]["uuids"]))
        return executor(*args, **kwargs)

    model = tiny(kind)
    two = tools.PAG(perturbation=tools.IdentityAttention(tools.resolve_layers(model, "auto"), "passthrough"))
    run(tools.with_wrapper(guided(model, pag(model), two), WrappersMP.APPLY_MODEL, note))
    assert len(seen) == STEPS
    assert all(len(set(chunks)) == len(chunks) == 4 for chunks in seen)
    assert all(chunks == seen[0] for chunks in seen)
    assert all(isinstance(chunk, uuid.UUID) for chunk in seen[0])


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_an_attention_override_is_still_called(kind):
    model = tiny(kind)
    rows = []

    def override(func, *args, **kwargs):
        rows.append(len(args[0]))
        return func(*args, **kwargs)

    overridden = model.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = override
    expected = run(guided(model, pag(model)))
    assert rows == []
    assert close(run(guided(overridden, pag(model))), expected)
    assert set(rows) >= {2, 3}  # in the perturbed layer the two ordinary rows only


def test_post_cfg_functions_see_our_result_in_graph_order():
    model = tiny("unet")
    seen = []

    def probe(name):
        def note(args):
            seen.append((name, args["denoised"]))
            return args["denoised"]

        def attach_probe(model):
            clone = model.clone()
            clone.set_model_sampler_post_cfg_function(note)
            return clone

        return attach_probe

    weak = tiny("unet", seed=7)
    chain = probe("first")(guided(model, APG(momentum=0.0)))
    chain = probe("second")(guided(chain, pag(model, 2.0)))
    chain = probe("third")(guided(chain, Autoguidance(weak_model=weak, scale=1.5)))
    result = sample(chain, steps=1, latent=empty_latent(model, 1, 8))
    values = dict(seen)
    assert [name for name, _ in seen] == ["first", "second", "third"]
    rules = APG(momentum=0.0), pag(model, 2.0), Autoguidance(weak_model=weak, scale=1.5)
    for count, name in enumerate(values, start=1):
        expected = sample(reference(model, *rules[:count]), steps=1, latent=empty_latent(model, 1, 8))
        assert close(model.model.process_latent_out(values[name]), expected)
    assert close(result, model.model.process_latent_out(values["third"]))


def test_a_pre_cfg_function_decides_what_a_shaper_gets():
    model = tiny("unet")
    equal = model.clone()
    equal.set_model_sampler_pre_cfg_function(lambda args: [args["conds_out"][0]] * 2)
    assert close(run(guided(equal, APG())), run(model, cfg=1.0))
