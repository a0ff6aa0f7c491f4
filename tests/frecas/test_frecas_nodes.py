"""The nodes: the cascade equals the graph of its parts, and both say what they cannot do."""

from __future__ import annotations

import numpy as np
import pytest
import tools
import torch
from frecas_tools import ENDS, KINDS, cascade, pixels, sample, text
from tools import comfy, cond, custom
from torch import Tensor

from lodestar.demo.models import load_vae
from lodestar.guiders.frecas.levels import stage_sigmas
from lodestar.guiders.frecas.transition import stage_seed
from lodestar.guiders.shapers.apg import APG
from lodestar.nodes.frecas import LodestarFreCaS, LodestarStageTransition
from lodestar.nodes.shapers.frequency import LodestarFrequencyGuidance

# --- the cascade from its parts --------------------------------------------------------------------------------------


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


# --- the nodes -------------------------------------------------------------------------------------------------------


def node(model, **changes):
    """The FreCaS node's outputs."""
    inputs = {
        "model": model, "positive": cond(1), "negative": cond(2), "vae": load_vae(), "seed": 1, "cfg": 4.0, "sampler": "euler",
        "scheduler": "normal", "stages": text("unet"), "gamma": -1.0, "high_scale": 9.0, "map_weight": 0.6, "resize": "nearest",
        "batch_size": 2,
    }  # fmt: skip
    with torch.inference_mode():
        return LodestarFreCaS.execute(**inputs | changes).args


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
        ({"sampler": "euler_cfg_pp"}, r"\(high_scale\) and euler_cfg_pp do not combine: .*, or set high_scale to cfg"),
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
    with tools.counted(model) as rows, pytest.raises(ValueError, match=r"FA-CFG \(Frequency-aware CFG\) and .* both replace"):
        node(model)
    assert not rows and node(model, high_scale=4.0)


def test_a_sampler_of_cfgpp_goes_along_the_stages_without_fa_cfg():
    model = pixels("unet")
    assert node(model, sampler="euler_cfg_pp", cfg=0.6, high_scale=0.6)[0]["samples"].isfinite().all()
    with (
        tools.counted(model) as rows,
        pytest.raises(ValueError, match=r"^APG \(Adaptive Projected Guidance\) and euler_cfg_pp do not combine"),
    ):
        node(tools.guided(model, APG()), sampler="euler_cfg_pp", cfg=0.6, high_scale=0.6)
    assert not rows


def transition(model, width=32, denoised=None, sigmas=None, **changes):
    settings = {"height": width, "steps": 3, "end": 0.0, "scheduler": "normal", "gamma": -1.0, "resize": "nearest"}
    more = {"seed": 1, "stage": 1, "batch_size": 1}
    return LodestarStageTransition.execute(model, load_vae(), width, denoised=denoised, sigmas=sigmas, **settings | more | changes).args


def test_the_transition_node_refuses_what_it_cannot_do():
    model, latent = pixels("mmdit"), {"samples": torch.zeros(1, 3, 16, 16)}
    sigmas = stage_sigmas(model.get_model_object("model_sampling"), "normal", 3, end=0.4)
    with pytest.raises(ValueError, match="connect both denoised and sigmas, or neither"):
        transition(model, denoised=latent)
    with pytest.raises(ValueError, match=r"^FreCaS Stage Transition: stage 0 is the first, .*; set stage to 1 or more, or "):
        transition(model, denoised=latent, sigmas=sigmas, stage=0)
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
