"""Facts about the host, asked of its own samplers, guiders and models."""

from __future__ import annotations

from functools import partial

import pytest
from tools import comfy, cond, custom, perpneg, tiny

from lodestar.guiders.engine.host import (
    cfg_slot_owner,
    combines_itself,
    describe_latent,
    is_dual_cfg,
    is_known_to_combine,
    reads_uncond,
    same_latent,
)


def test_samplers_that_read_uncond():
    names = [name for name in comfy.samplers.SAMPLER_NAMES if reads_uncond(comfy.samplers.sampler_object(name))]
    assert names and names == [name for name in comfy.samplers.SAMPLER_NAMES if name.endswith("_cfg_pp")]
    assert reads_uncond(comfy.samplers.sampler_object("euler_cfg_pp")) == "euler_cfg_pp"

    def ours():
        pass

    assert reads_uncond(partial(ours)) is None
    ours.reads_uncond = "A Node"
    assert reads_uncond(partial(ours)) == "A Node"


def test_guiders():
    model, prompts = tiny("unet"), (cond(1), cond(2), cond(3))
    dual = custom.DualCFGGuider.execute(model, *prompts, cfg_conds=3.0, cfg_cond2_negative=2.0, style="regular").result[0]
    perp = perpneg.PerpNegGuider.execute(model, *prompts, 3.0, 0.7).result[0]
    plain = [comfy.samplers.CFGGuider(model), custom.BasicGuider.execute(model, cond(1)).result[0]]
    assert [combines_itself(guider) for guider in (dual, perp, *plain)] == [True, True, False, False]
    assert [is_dual_cfg(guider) for guider in (dual, perp, *plain)] == [True, False, False, False]

    class Foreign(comfy.samplers.CFGGuider):
        def predict_noise(self, *args):
            return super().predict_noise(*args)

    class ForeignPerp(type(perp)):
        def predict_noise(self, *args):
            return super().predict_noise(*args)

    foreign = [Foreign(model), ForeignPerp(model)]
    assert [combines_itself(guider) for guider in foreign] == [True, True]
    assert [is_known_to_combine(guider) for guider in (dual, perp, *plain, *foreign)] == [True, True, False, False, False, True]
    for module, known in (("/home/me/ComfyUI/comfy_extras/nodes_perpneg", True), ("/home/me/ComfyUI/custom_nodes/comfy_extras_too", False)):
        Foreign.__module__ = module  # as the host names what it has loaded by a file
        assert is_known_to_combine(foreign[0]) is known


def test_the_owner_of_the_cfg_slot():
    class Node:
        def patch(self):
            return lambda args: args["cond"]

    assert cfg_slot_owner({}) is None
    assert cfg_slot_owner({"sampler_cfg_function": test_guiders}) == "test_guiders"
    assert cfg_slot_owner({"sampler_cfg_function": partial(test_guiders)}) == "partial"
    assert cfg_slot_owner({"sampler_cfg_function": Node().patch}) == "test_the_owner_of_the_cfg_slot"


@pytest.mark.parametrize(("other", "same"), [("unet", True), ("unet_v", True), ("mmdit", False)])
def test_latents(other, same):
    assert same_latent(tiny("unet"), tiny(other)) is same
    assert describe_latent(tiny("unet")) == "SD15 (4 channels)"
