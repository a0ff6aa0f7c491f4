"""What cannot work is refused in one sentence, before anything is sampled."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import pytest
from tools import attach, comfy, counted, empty_latent, guided, perpneg, sample, tiny

from lodestar.guiders.engine import checks
from lodestar.guiders.engine.choice import Choice
from lodestar.guiders.engine.plan import GuidancePlan, Policy, Shaper
from lodestar.guiders.engine.start import Start
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.shapers.frequency import FrequencyGuidance


@dataclass(frozen=True, kw_only=True)
class Weights(Policy):
    """A policy that claims something."""

    name: ClassVar[str] = "Weights"
    claims: ClassVar[str] = "the weight of each step"
    active: bool = True

    @property
    def neutral(self):
        return not self.active

    def choose(self, step):
        return Choice(weight=2.0)


class Strict(Weights):
    """Refuses everything."""

    name: ClassVar[str] = "Strict"

    def check(self, start):
        raise ValueError(f"{type(start.guider).__name__} {start.sampler.sampler_function.__name__} {len(start.sigmas)} {start.shape}")


@dataclass(frozen=True, kw_only=True)
class StrictShaper(Shaper):
    """A shaper that notes when it was asked."""

    name: ClassVar[str] = "Strict shaper"
    neutral = False
    asked: list = field(default_factory=list)

    def check(self, start):
        self.asked.append(start.shape)

    def shape(self, update, cond, w, step):
        return update


def run(model, **more):
    return sample(model, steps=4, latent=empty_latent(model, 3, 8), **more)


def test_two_policies_with_the_same_claim_are_refused():
    one = attach(tiny("unet"), Weights())
    with pytest.raises(ValueError, match=r"^Weights and Weights both decide the weight of each step; bypass one of the two nodes\.$"):
        attach(one, Weights())
    attach(one, Weights(active=False))
    attach(one, APG())


def test_rules_are_asked_before_sampling():
    model = tiny("unet")
    with counted(model) as rows, pytest.raises(ValueError, match=r"^CFGGuider sample_euler 5 \(3, 4, 8, 8\)$"):
        run(guided(model, Strict()))
    assert not rows
    shaper = StrictShaper()
    run(guided(model, shaper, Strict(active=False)))
    assert shaper.asked == [(3, 4, 8, 8)]


def test_one_sentence_for_everybody_who_cannot_work_without_uncond():
    with pytest.raises(
        ValueError, match=r"^A Rule cannot work with the sampler euler_cfg_pp: .* Choose a sampler that is not CFG\+\+, or bypass A Rule\.$"
    ):
        checks.refuse_uncond_readers("A Rule", comfy.samplers.sampler_object("euler_cfg_pp"))
    checks.refuse_uncond_readers("A Rule", comfy.samplers.sampler_object("euler"))


def test_shapers_are_refused_where_the_sampler_reads_uncond():
    """Its cfg is a lambda there, for which cfg - 1 is negative."""
    model = tiny("unet")
    for rule in (APG(), StrictShaper(), FrequencyGuidance(low_height=4, low_width=4)):
        for sampler in ("euler_cfg_pp", "dpmpp_2m_cfg_pp"):
            name = re.escape(rule.name)
            message = rf"^{name} and {sampler} do not combine: .*; use a sampler that is not CFG\+\+, or bypass {name}\.$"
            with counted(model) as rows, pytest.raises(ValueError, match=message):
                run(guided(model, rule), sampler=sampler)
            assert not rows
    neutral = guided(model, APG(eta=1.0, norm_threshold=0.0, momentum=0.0))
    assert run(neutral, sampler="euler_cfg_pp").equal(run(model, sampler="euler_cfg_pp"))


def test_a_guider_that_combines_predictions_is_refused_for_shapers_and_policies_only():
    guider = perpneg.Guider_PerpNeg(tiny("unet"))
    start = Start(guider, SimpleNamespace(), None, None)
    checks.check_start(GuidancePlan(), start)
    for rule in (APG(), Weights()):
        with pytest.raises(
            ValueError, match=r"cannot work with Guider_PerpNeg: that guider combines the predictions itself\. .* or bypass"
        ):
            checks.check_start(GuidancePlan().plus(rule), start)
    checks.check_start(GuidancePlan().plus(Weights(active=False)), start)


def test_what_a_guider_of_another_pack_does_is_not_known_before_it_has_done_it():
    class Own(comfy.samplers.CFGGuider):
        def predict_noise(self, *args, **kwargs):
            raise NotImplementedError

    start = Start(Own(tiny("unet")), SimpleNamespace(), None, None)
    checks.check_start(GuidancePlan().plus(APG()).plus(Weights()), start)


def test_a_claimed_cfg_slot_is_refused_at_the_node_and_at_the_start():
    model = tiny("unet")
    claimed = model.clone()
    claimed.set_model_sampler_cfg_function(lambda args: args["cond"])
    with pytest.raises(ValueError, match=r"^APG \(Adaptive Projected Guidance\) and .* both replace the CFG combination"):
        attach(claimed, APG())
    later = attach(model, APG())
    later.set_model_sampler_cfg_function(lambda args: args["cond"])
    with counted(model) as rows, pytest.raises(ValueError, match="both replace the CFG combination"):
        run(later)
    assert not rows
    attach(claimed, APG(eta=1.0, norm_threshold=0.0, momentum=0.0))
