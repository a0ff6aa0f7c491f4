"""Messages about runs that go on: none to nobody, the truth to a listener, and never another picture."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import ClassVar

import pytest
import tools
import torch
from frecas_tools import pixels, text
from frecas_tools import sample as sample_cascade
from policy_tools import CFG, runs
from tools import attach, log_of, tiny

from lodestar.guiders.cfgpp import inversion
from lodestar.guiders.cfgpp.inversion import invert, noise_strength
from lodestar.guiders.cfgpp.sampler import cfgpp_sampler
from lodestar.guiders.cfgpp.solvers import equivalent_cfg
from lodestar.guiders.engine import curves, telemetry
from lodestar.guiders.engine import run as run_module
from lodestar.guiders.engine.plan import GuidancePlan, Shaper
from lodestar.guiders.policies.adaptive import AdaptiveGuidance
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.policies.linear_ag.fit import fit
from lodestar.guiders.policies.linear_ag.rule import LinearAG
from lodestar.guiders.policies.search import search
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.spaces import Level, levels_of

KINDS = ["unet", "unet_v", "mmdit"]


class Listener:
    """Keeps the messages, as the page gets them."""

    def __init__(self) -> None:
        self.here, self.messages = True, []

    def present(self) -> bool:
        return self.here

    def send(self, message) -> None:
        self.messages.append(json.loads(json.dumps(message, allow_nan=False)))


@pytest.fixture
def listener(monkeypatch):
    """Somebody who wants to know about every evaluation."""
    monkeypatch.setattr(telemetry, "PERIOD", 0.0)
    heard = Listener()
    telemetry.connect(lambda: heard)
    yield heard
    telemetry.connect(None)


def guided(model, *rules):
    """The model with rules that come from the nodes "1", "2" and so on."""
    for number, rule in enumerate(rules, 1):
        model = attach(model, rule, str(number))
    return model


def ag(threshold: float, **more) -> AdaptiveGuidance:
    return AdaptiveGuidance(threshold=threshold, **more)


# --- nobody listens --------------------------------------------------------------------------------------------------


def test_without_a_listener_nothing_is_computed(monkeypatch):
    calls = []
    for owner, name in ((run_module.Run, "log_so_far"), (curves.Curves, "collect_ready"), (telemetry, "Telemetry"), (telemetry, "joined")):
        monkeypatch.setattr(owner, name, lambda *_, name=name: calls.append(name))
    asked = []
    telemetry.connect(lambda: asked.append(1))
    try:
        tools.sample(guided(tiny("unet"), APG(), ag(0.9)), steps=5)
    finally:
        telemetry.connect(None)
    assert asked == [1]  # once per sampling call, whatever the number of its steps
    assert calls == []


def test_somebody_who_left_before_the_start_is_told_nothing(listener, monkeypatch):
    listener.here = False
    monkeypatch.setattr(curves.Curves, "collect_ready", lambda _: pytest.fail("read for nobody"))
    tools.sample(guided(tiny("unet"), APG()))
    assert not listener.messages


def test_nobody_is_asked_about_plans_that_show_nothing(listener):
    telemetry.connect(lambda: pytest.fail("there is nothing to show"))
    model = tiny("unet")
    tools.sample(attach(model))
    tools.sample(tools.guided(model, APG()))  # from no node
    tools.sample(guided(model, *tools.neutral_rules("unet"), ag(1.001), GuidanceInterval()))


# --- somebody listens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_is_the_same_bit_for_bit(kind, listener):
    model = tiny(kind)
    rules = [*tools.all_rules(kind), ag(0.99), GuidanceInterval(end_percent=0.8)]
    plain, watched = tools.guided(model, *rules), guided(model, *rules)
    for sampler in ("euler", "heun", "dpmpp_2m_sde"):
        without = tools.sample(plain, sampler=sampler)
        listener.messages.clear()
        assert tools.sample(watched, sampler=sampler).equal(without)
        assert len(listener.messages) > 5


def test_messages_lead_up_to_the_log(listener):
    main = guided(tiny("unet"), APG(), tools.pag(tiny("unet")), tools.neutral_rules("unet")[2])
    tools.sample(main, steps=6)
    *on_the_way, last = listener.messages
    assert [message["step"] for message in on_the_way] == [1, 2, 3, 4, 5, 6]
    assert [message["nfe"] for message in on_the_way] == [3, 6, 9, 12, 15, 18]
    assert not any(message["done"] for message in on_the_way) and last["done"]
    log = log_of(main)
    assert (last["step"], last["steps"], last["nfe"], last["saved"]) == (6, 6, log.nfe, 0)
    assert set(last["nodes"]) == {"1", "2"}  # the third one is neutral
    for node, name in (("1", APG.name), ("2", "PAG (Perturbed-Attention Guidance)")):
        curve = last["nodes"][node]
        assert (curve["curve"], curve["kind"]) == (name, "update") and "switch" not in curve
        assert curve["role"] == ("shaper" if node == "1" else "term")
        assert dict(curve["points"]) == pytest.approx(tools.curves_of(log)[name], rel=1e-4)
        for number, message in enumerate(on_the_way, 1):
            assert message["nodes"][node]["points"] == curve["points"][:number]  # whole series: what was missed does not matter


def test_two_nodes_of_a_kind_have_curves_of_their_own(listener):
    main = guided(tiny("unet"), tools.pag(tiny("unet"), 1.0), tools.pag(tiny("unet"), 4.0))
    tools.sample(main, steps=3)
    one, two = (listener.messages[-1]["nodes"][node]["points"] for node in "12")
    assert all(a[1] < b[1] for a, b in zip(one, two, strict=True))


def test_branches_of_a_graph_tell_of_their_own_rules(listener):
    trunk = guided(tiny("unet"), APG())
    left, right = attach(trunk, tools.pag(trunk), "7"), attach(trunk, ag(-1.0), "8")
    for model, nodes in ((left, {"1", "7"}), (right, {"1", "8"}), (trunk, {"1"}), (left, {"1", "7"})):
        listener.messages.clear()
        tools.sample(model, steps=2)
        assert {node for message in listener.messages for node in message["nodes"]} == nodes


@pytest.mark.parametrize("switch", ["next_step", "same_step"])
def test_the_switch_of_adaptive_guidance(listener, switch):
    main = guided(tiny("unet"), ag(0.99, switch=switch))
    tools.sample(main, steps=8, latent=tools.empty_latent(main, 3))
    log = log_of(main)
    steps = list(log.switches[AdaptiveGuidance.name].steps)
    last = listener.messages[-1]
    assert last["nodes"]["1"]["switch"] == {"threshold": 0.99, "steps": steps}
    assert last["nodes"]["1"]["kind"] == "cosine"
    assert last["nodes"]["1"]["role"] == "policy" and last["saved"] == pytest.approx(log.saved, abs=0.01) and last["saved"] > 0
    for message in listener.messages:  # every picture's switch is known from the step on in which it happens
        told = message["nodes"]["1"]["switch"]["steps"] or [None] * 3
        assert told == [step if step is not None and step < message["step"] else None for step in steps]


def test_an_interval_shows_where_cfg_acts(listener):
    main = guided(tiny("unet"), GuidanceInterval(start_percent=0.3, end_percent=0.7))
    tools.sample(main, steps=8)
    last = listener.messages[-1]
    inside = [step for step, _ in last["nodes"]["1"]["points"]]
    assert inside and inside == list(range(inside[0], inside[-1] + 1)) and len(inside) < 8
    assert last["evaluations"] == [[step, 1 + (step in inside)] for step in range(8)]
    assert last["saved"] == 8 - len(inside)


def test_messages_keep_their_distance(listener, monkeypatch):
    now = iter(0.1 * number for number in range(1000))
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(telemetry, "PERIOD", 0.25)
    reads = []
    monkeypatch.setattr(
        curves.Curves, "collect_ready", lambda self, original=curves.Curves.collect_ready: reads.append(1) or original(self)
    )
    tools.sample(guided(tiny("unet"), APG()), steps=9)
    assert [message["step"] for message in listener.messages] == [1, 4, 7, 9]
    assert len(reads) == 3  # the last message has the values that the run reads anyway


def test_a_page_that_is_loaded_again_gets_the_end(listener):
    present = iter([True, False, False, False, False])
    listener.present = lambda: next(present)
    tools.sample(guided(tiny("unet"), APG()), steps=4)
    assert [(message["step"], message["done"]) for message in listener.messages] == [(1, False), (4, True)]


@dataclass(frozen=True, kw_only=True)
class Breaking(Shaper):
    """Spoils the picture in the second step."""

    name: ClassVar[str] = "Breaking"
    short: ClassVar[str] = "Breaking"
    neutral = False

    def shape(self, update, cond, w, step):
        return update * math.inf if step.index == 1 else update * 2


def test_values_that_are_not_finite_are_gaps(listener):
    tools.sample(guided(tiny("unet"), Breaking()), steps=3)
    (step, first), *others = listener.messages[-1]["nodes"]["1"]["points"]
    assert step == 0 and first == float(f"{first:.5g}") > 0
    assert others == [[1, None], [2, None]]


def test_an_interrupted_run_ends_what_it_told(listener):
    def stop(step, *_) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tools.sample(guided(tiny("unet"), APG()), steps=6, callback=stop)
    assert listener.messages[-1]["done"] and listener.messages[-1]["step"] == 2


def test_a_plan_forgets_no_node():
    plan = GuidancePlan().plus(APG(), "1").plus(APG()).plus(APG(), "3")
    assert [entry.node for entry in plan.entries] == ["1", None, "3"] and len(plan.rules) == 3


# --- the cascade -----------------------------------------------------------------------------------------------------


def test_a_cascade_tells_of_its_stages_as_of_one_run(listener):
    model = guided(pixels("unet"), APG(eta=0.5))
    plain = sample_cascade(tools.guided(pixels("unet"), APG(eta=0.5)), text("unet"), map_weight=0.6, high_scale=4.0)
    assert sample_cascade(model, text("unet"), map_weight=0.6, high_scale=4.0, node="9")[-1].equal(plain[-1])
    assert [message["stage"] for message in listener.messages] == [0] * 5 + [1] * 4  # each stage's steps, and its end
    assert [message["step"] for message in listener.messages] == [1, 2, 3, 4, 4, 5, 6, 7, 7]
    assert [message["done"] for message in listener.messages] == [False] * 8 + [True]
    last = listener.messages[-1]
    assert last["stages"] == [{"width": 16, "height": 16, "steps": 4}, {"width": 32, "height": 32, "steps": 3}]
    assert last["steps"] == 7 and last["nfe"] == 14 and last["nodes"]["9"]["role"] == "cascade"
    assert [step for step, _ in last["nodes"]["9"]["points"]] == list(range(7))
    assert [step for step, _ in last["nodes"]["1"]["points"]] == list(range(7))


def test_switches_in_a_later_stage_are_counted_from_the_first(listener):
    sample_cascade(guided(pixels("unet"), ag(-1.0)), text("unet"), node="9")
    assert listener.messages[-1]["nodes"]["1"]["switch"]["steps"] == [5]


def test_a_cascade_of_no_node_tells_nothing(listener):
    sample_cascade(pixels("unet"), text("unet"))
    assert not listener.messages


# --- samplers, fits, searches ----------------------------------------------------------------------------------------


def schedule(model, steps: int = 5) -> torch.Tensor:
    return tools.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


@pytest.mark.parametrize("rules", [(), (GuidanceInterval(end_percent=0.6),)])
def test_the_cfgpp_sampler_of_a_node(listener, rules):
    """With a model that carries rules, which have messages of their own, and with one that carries none."""
    model = guided(tiny("unet"), *rules)
    guider = tools.comfy.samplers.CFGGuider(model)
    guider.set_conds(tools.cond(1), tools.cond(2))
    sigmas = schedule(model)
    noise = torch.randn(tools.empty_latent(model).shape, generator=torch.Generator().manual_seed(1))

    def run_it(node):
        with torch.inference_mode():
            sampler = cfgpp_sampler("euler", 0.6, node=node)
            return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)

    plain = run_it(None)
    assert not any("5" in message["nodes"] for message in listener.messages)
    assert run_it("5").equal(plain)
    messages = [message for message in listener.messages if "5" in message["nodes"]]
    last = messages[-1]
    curve = last["nodes"]["5"]
    assert (curve["kind"], curve["role"]) == ("weight", "trace") and (last["step"], last["steps"], last["done"]) == (5, 5, True)
    weights = [value for _, value in curve["points"]]
    levels = levels_of(sigmas.tolist(), flow=False)
    worth = [equivalent_cfg(0.6, now, then) for now, then in pairwise(levels)]
    assert weights[:3] == pytest.approx(worth[:3], rel=1e-4)
    assert weights[3:] == pytest.approx([1, 1] if rules else worth[3:], rel=1e-4)  # outside of the interval
    assert [message["step"] for message in messages] == [1, 2, 3, 4, 5, 5]
    assert [message["nodes"]["5"]["points"] for message in messages[:-1]] == [curve["points"][:number] for number in range(1, 6)]


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_an_inversion_tells_how_strong_its_noise_is(listener, kind):
    model = tiny(kind)
    latent = torch.randn(tools.empty_latent(model).shape, generator=torch.Generator().manual_seed(2))

    def run_it(node):
        with torch.inference_mode():
            return invert(model, tools.cond(1), tools.cond(2), {"samples": latent}, schedule(model), 0.6, node)

    plain, _ = run_it(None)
    assert not listener.messages
    noise, sigmas = run_it("6")
    assert noise["samples"].equal(plain["samples"])
    last = listener.messages[-1]
    curve = last["nodes"]["6"]
    assert last["done"] and (last["step"], last["steps"], last["unit"]) == (5, 5, "step")
    assert (curve["kind"], [step for step, _ in curve["points"]]) == ("noise", list(range(5)))
    level = levels_of(sigmas.tolist(), kind == "mmdit")[0]
    x = level.a * model.model.process_latent_in(noise["samples"])  # next to nothing but noise at this level
    assert curve["points"][-1][1] == pytest.approx(float(x.square().mean().sqrt()) / level.s, rel=0.1)


def test_the_strength_of_noise():
    clean, noise = (torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    for level in (Level(1.0, 14.6), Level(0.1, 0.9)):
        for strength in (1.0, 0.4):
            x = level.a * clean + level.s * strength * noise
            assert float(noise_strength(x, clean, level)) == pytest.approx(strength, rel=0.02)


def test_a_fit_tells_what_it_does_not_predict(listener):
    model = tiny("unet")
    fitted = fit(runs(model, steps=6), 3, "7")
    assert [message["step"] for message in listener.messages] == [1, 2, 3, 3]
    last = listener.messages[-1]
    assert last["done"] and (last["steps"], last["unit"], last["nodes"]["7"]["kind"]) == (3, "run", "residual")
    assert last["nodes"]["7"]["points"][-1][1] == pytest.approx(mean(1 - r2 for r2, *_ in fitted.r2.values()), rel=1e-3)
    listener.messages.clear()
    assert fit(runs(model, steps=6), 3).hash == fitted.hash and not listener.messages
    tools.sample(guided(model, LinearAG(coefficients=fitted)), steps=6, cfg=CFG)
    node = listener.messages[-1]["nodes"]["1"]
    assert (node["role"], node["predicted"]) == ("policy", [1]) and [step for step, _ in node["points"]] == [0, 2]


def test_a_search_tells_its_loss_and_its_policy(listener):
    model = tiny("unet")
    policy, _ = search(runs(model, steps=3), 3, 0.05, "8")
    last = listener.messages[-1]
    assert last["done"] and (last["step"], last["steps"], last["unit"], last["nodes"]["8"]["kind"]) == (3, 3, "iteration", "loss")
    assert last["nfe"] == policy.nfe and last["nfe"] + last["saved"] == 6
    listener.messages.clear()
    assert search(runs(model, steps=3), 3, 0.05)[0] == policy and not listener.messages


def test_without_a_listener_nothing_is_traced(monkeypatch):
    monkeypatch.setattr(telemetry, "Trace", lambda *_: pytest.fail("traced for nobody"))
    monkeypatch.setattr(inversion, "noise_strength", lambda *_: pytest.fail("computed for nobody"))
    model = tiny("unet")
    with torch.inference_mode():
        invert(model, tools.cond(1), tools.cond(2), {"samples": tools.empty_latent(model) + 1}, schedule(model, 2), 0.6, "6")


def test_a_shaper_tells_what_cfg_alone_would_do(listener):
    """APG with neutral settings but for a threshold that nothing meets: its update is that of CFG."""
    tools.sample(guided(tiny("unet"), APG(eta=1.0, momentum=0.0, norm_threshold=1e9)), steps=3, cfg=4.0)
    node = listener.messages[-1]["nodes"]["1"]
    assert node["role"] == "shaper" and len(node["plain"]) == 3
    for (step, value), (same, plain) in zip(node["points"], node["plain"], strict=True):
        assert step == same and value == pytest.approx(plain, rel=1e-3)
