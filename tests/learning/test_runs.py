"""The runs that fits and searches learn from."""

from __future__ import annotations

import pytest
import tools
import torch

from lodestar.guiders.learning.runs import Runs


def runs(model, latent, sampler="euler", steps=4):
    """Runs on one LATENT."""
    sigmas = tools.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    return Runs(
        name="A fit", model=model, positive=[tools.cond(1)], negative=tools.cond(2), latent=latent,
        sampler=tools.comfy.samplers.sampler_object(sampler), sigmas=sigmas, cfg=4.0, seed=5,
    )  # fmt: skip


def sampled(these: Runs) -> torch.Tensor:
    """What the first run makes."""
    with torch.inference_mode():
        return these.sample(these.guider(0, these.model), 0, these.sampler)


def test_an_empty_latent_gets_the_length_that_the_host_gives_it():
    """The ratio of a latent that has one for time alone, as empty audio has, is none of space."""
    model = tools.tiny("wan")
    assert model.model.latent_format.temporal_downscale_ratio == 4
    latent = torch.zeros(1, 16, 2, 8, 8)
    assert sampled(runs(model, {"samples": latent, "downscale_ratio_temporal": 8})).shape == (1, 16, 4, 8, 8)
    assert sampled(runs(model, {"samples": latent, "downscale_ratio_spacial": 4})).shape == (1, 16, 2, 4, 4)
    assert sampled(runs(model, {"samples": latent})).shape == latent.shape


@pytest.mark.parametrize("sampler", ["uni_pc", "uni_pc_bh2"])
def test_a_sampler_that_writes_into_its_schedule_leaves_ours_alone(sampler):
    """Else the schedule that a result is kept for would be no schedule of the user's."""
    these = runs(tools.tiny("unet"), {"samples": torch.zeros(1, 4, 8, 8)}, sampler)
    levels = these.sigmas.clone()
    sampled(these)
    assert these.sigmas.equal(levels) and levels[-1] == 0
