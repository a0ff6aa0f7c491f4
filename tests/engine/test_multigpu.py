"""The host's splitting of conds over several GPUs, on two devices that are both the CPU: the same pictures, and every call is counted."""

from __future__ import annotations

import copy
import sys
import threading

import frecas_tools
import pytest
import tools
import torch
from policy_tools import runs
from tools import cond, counted, empty_latent, guided, log_of, pag, sample

from lodestar.demo.models import load_model
from lodestar.guiders.cfgpp.sampler import cfgpp_sampler
from lodestar.guiders.engine.keys import RUN
from lodestar.guiders.policies.adaptive import AdaptiveGuidance
from lodestar.guiders.policies.linear_ag.fit import fit
from lodestar.guiders.policies.linear_ag.rule import LinearAG
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance

multigpu = pytest.importorskip("comfy.multigpu", reason="this host does not split conds over devices")
KINDS = ["unet", "mmdit"]
STEPS, BATCH = 4, 2
DEVICES = [torch.device("cpu"), torch.device("cpu", 1)]


def loaded(load, *args):
    """A model that the host can load once more."""
    model = load(*args)
    model.cached_patcher_init = (load, args)
    return model


def tiny(kind: str, seed: int = 0):
    return loaded(tools.tiny, kind, seed)


@pytest.fixture
def split(monkeypatch):
    """What the host's MultiGPU node does with a model."""
    monkeypatch.setattr(tools.comfy.model_management, "get_all_torch_devices", lambda *_, **__: DEVICES)
    return lambda model: multigpu.create_multigpu_deepclones(model, 2)


def networks(model) -> list:
    """The model, and what the host made of it for the other device."""
    both = [model, *model.get_additional_models_with_key("multigpu")]
    assert [patcher.load_device for patcher in both] == DEVICES
    assert both[0].model is not both[1].model
    return both


def run(model, **more):
    return sample(model, **{"steps": STEPS, "latent": empty_latent(model, BATCH, 8), "scheduler": "normal"} | more)


def linear_ag(kind: str) -> LinearAG:
    """Fitted on one device."""
    with torch.inference_mode():
        return LinearAG(coefficients=fit(runs(tiny(kind), steps=8, cfg=4.0), 2))


RULES = {
    "no rule": lambda kind: [],
    "APG": lambda kind: [APG(momentum=-0.5, norm_threshold=2.0)],
    "PAG": lambda kind: [pag(tiny(kind))],
    "AG": lambda kind: [AdaptiveGuidance(threshold=0.9)],
    "LinearAG": lambda kind: [linear_ag(kind)],
    "Autoguidance": lambda kind: [Autoguidance(weak_model=tiny(kind, 7), scale=1.5)],
    "all": lambda kind: [
        APG(momentum=-0.5),
        pag(tiny(kind)),
        Autoguidance(weak_model=tiny(kind, 7), scale=1.5),
        AdaptiveGuidance(threshold=0.9),
    ],
}


ORDERS = [(name, "rules behind") for name in RULES] + [("all", "rules before")]


@pytest.mark.parametrize(
    ("kind", "name", "order"), [(kind, *order) for kind in KINDS for order in ORDERS] + [("pixart", "PAG", "rules behind")]
)
def test_two_devices_make_the_picture_of_one(split, name, kind, order):
    rules, model = RULES[name](kind), tiny(kind)
    more = {"steps": 8} if name == "LinearAG" else {}
    one = guided(tools.attach(model), *rules)
    expected = run(one, **more)
    two = guided(split(tools.attach(model)), *rules) if order == "rules behind" else split(guided(tools.attach(model), *rules))
    weak = [branch.model for rule in rules for branch in rule.branches if branch.model is not None]
    with counted(*networks(two), *weak) as rows, counted(networks(two)[1]) as second:
        result = run(two, **more)
    assert tools.close(result, expected, 1e-5)
    assert second
    assert (log_of(two).rows, log_of(two).calls) == (sum(rows), len(rows))
    assert (log_of(two).rows, log_of(two).nfe) == (log_of(one).rows, log_of(one).nfe)
    assert log_of(two).evaluations == pytest.approx(log_of(one).evaluations)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("kind", KINDS)
def test_cfgpp_on_two_devices(split, kind, solver):
    model = tools.attach(tiny(kind))

    def picture(model):
        sigmas = tools.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
        latent = empty_latent(model, BATCH, 8)
        noise = tools.comfy.sample.prepare_noise(latent, 1)
        with torch.inference_mode():
            return tools.comfy.sample.sample_custom(
                model, noise, 1.0, cfgpp_sampler(solver, 0.6), sigmas, cond(1), cond(2), latent, disable_pbar=True, seed=1
            )

    expected = picture(model)
    two = split(model)
    with counted(networks(two)[1]) as second:
        assert tools.close(picture(two), expected, 1e-5)
    assert second


@pytest.mark.parametrize("maps", [0.0, 0.4], ids=["plain", "maps"])
@pytest.mark.parametrize("kind", KINDS)
def test_frecas_on_two_devices(split, kind, maps):
    model = tools.attach(loaded(frecas_tools.pixels, kind))
    stages = frecas_tools.text(kind, steps=(3, 2))
    expected = frecas_tools.sample(model, stages, map_weight=maps)
    two = split(model)
    with counted(networks(two)[1]) as second:
        results = frecas_tools.sample(two, stages, map_weight=maps)
    assert second
    assert all(tools.close(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


def test_a_demo_model_can_be_a_weak_model_on_two_devices(split):
    main, weak = (load_model("mmdit", strength) for strength in ("main", "weak"))
    two = split(guided(main, Autoguidance(weak_model=weak)))
    assert [type(model.model) for model in networks(two)[1].get_additional_models()] == [type(weak.model)]


# --- counters --------------------------------------------------------------------------------------------------------


class Slow(dict):
    """Other threads have their turn between a look and what is done with it."""

    def get(self, *args):
        found = super().get(*args)
        threading.Event().wait(0.001)
        return found


def test_counters_are_exact_when_several_threads_call():
    found = []
    model = tools.attach(tiny("unet"))
    model.set_model_sampler_post_cfg_function(
        lambda args: (found.append(args["model_options"]["transformer_options"][RUN]), args["denoised"])[1]
    )
    run(model)
    counting = found[-1]
    before = copy.copy(counting.log)
    step, counting.log.evaluations = counting.evaluation.index, Slow(counting.log.evaluations)
    threads = [threading.Thread(target=lambda: [counting.count(2, 1) for _ in range(20)]) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    log = counting.log
    assert (log.calls - before.calls, log.rows - before.rows, log.nfe - before.nfe) == (80, 160, 80)
    assert log.evaluations[step] - before.evaluations[step] == 80
