"""The engine on the real host: what is evaluated in which call, and that it is the same guidance as without the engine."""

from __future__ import annotations

import gc
import weakref

import pytest
import tools
import torch
from tools import KINDS, attach, close, comfy, counted, empty_latent, guided, log_of, pag, reference, sample, tiny

from lodestar.guiders.engine.keys import RUN
from lodestar.guiders.engine.log import last_log
from lodestar.guiders.engine.plan import plan_of
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance

STEPS = 3


def small(model, batch: int = 1):
    return empty_latent(model, batch, 8)


def run(model, batch: int = 1, **more):
    return sample(model, steps=STEPS, latent=small(model, batch), **more)


# --- what is evaluated -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_of_a_model_are_one_call(kind, batch):
    model, weak = tiny(kind), tiny(kind, seed=7)
    main = guided(model, APG(), pag(model), Autoguidance(weak_model=weak))
    with counted(model) as rows, counted(weak) as weak_rows:
        run(main, batch)
    assert rows == [3 * batch] * STEPS
    assert weak_rows == [batch] * STEPS
    log = log_of(main)
    assert (log.calls, log.rows, log.nfe) == (2 * STEPS, 4 * batch * STEPS, 4 * STEPS)
    assert (log.steps, log.batch) == (STEPS, batch)


@pytest.mark.parametrize(
    ("cfg", "rules", "expected"),
    [
        (4.0, lambda m: [pag(m)], 3),
        (1.0, lambda m: [pag(m)], 2),
        (1.0, lambda m: [APG()], 1),
        (4.0, lambda m: [pag(m), pag(m, scale=1.0, rescale=0.5)], 3),  # one branch for two rules
        (4.0, lambda m: [pag(m, scale=0.0)], 2),
        (4.0, lambda m: [Autoguidance(weak_model=tiny("unet", seed=7), scale=1.0)], 2),
        (4.0, lambda m: [], 2),
    ],
)
def test_rows_of_a_step(cfg, rules, expected):
    model = tiny("unet")
    main = guided(attach(model), *rules(model))
    with counted(model) as rows:
        run(main, batch=2, cfg=cfg)
    assert rows == [2 * expected] * STEPS
    assert log_of(main).rows == sum(rows)


def test_two_layers_are_two_branches():
    model = tiny("unet")
    other = tools.PAG(perturbation=tools.IdentityAttention(tools.resolve_layers(model, "input:1")))
    with counted(model) as rows:
        run(guided(model, pag(model), other))
    assert rows == [4] * STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_windows_decide_what_is_evaluated(kind):
    """PAG acts in the first part, CFG in the rest; each costs a row only there."""
    model = tiny(kind)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)
    share = 0.4
    boundary = float(model.get_model_object("model_sampling").percent_to_sigma(share))
    early = [float(s) > boundary for s in sigmas[:-1]]
    assert any(early) and not all(early)
    main = guided(model, pag(model, end_percent=share), GuidanceInterval(start_percent=share))
    with counted(model) as rows:
        sample(main, steps=6, latent=small(model))
    assert rows == [2] * 6
    main = guided(model, pag(model, end_percent=share), GuidanceInterval(end_percent=share))
    with counted(model) as rows:
        sample(main, steps=6, latent=small(model))
    assert rows == [3 if now else 1 for now in early]


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_splits_when_memory_is_short(kind, monkeypatch):
    model = tiny(kind)
    main = guided(model, *tools.all_rules(kind))
    whole = run(main, batch=2)
    monkeypatch.setattr(model.model, "memory_required", lambda shape, cond_shapes=None: 0 if shape[0] <= 2 else 1e30)
    with counted(model) as rows:
        split = run(main, batch=2)
    assert rows == [2] * 3 * STEPS
    assert close(split, whole)


# --- the same guidance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_unfused_evaluations(kind, sampler, cfg):
    """Every prediction is the one that the host computes when it is asked for it alone."""
    model = tiny(kind)
    rules = [APG(momentum=0.0, norm_threshold=2.0), *tools.all_rules(kind)[1:]]
    result = run(guided(model, *rules), sampler=sampler, cfg=cfg)
    assert close(result, run(reference(model, *rules), sampler=sampler, cfg=cfg))
    assert not close(result, run(model, sampler=sampler, cfg=cfg), 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_momentum_over_a_run(kind):
    model = tiny(kind)
    assert close(run(guided(model, APG())), run(reference(model, APG())))


@pytest.mark.parametrize("kind", KINDS)
def test_neutral_settings_are_the_model_itself(kind):
    model = tiny(kind)
    main = guided(model, *tools.neutral_rules(kind), GuidanceInterval())
    with counted(model) as rows:
        assert torch.equal(run(main), run(model))
    assert rows == [2] * 2 * STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_its_window_a_rule_leaves_no_rounding(kind):
    model = tiny(kind)
    main = guided(model, APG(start_percent=1.0), pag(model, start_percent=1.0))
    assert torch.equal(run(main), run(model))


# --- nothing shared, nothing left ------------------------------------------------------------------------------------


def test_a_run_leaves_nothing_in_the_model():
    model = tiny("unet")
    main = guided(model, APG(), pag(model), Autoguidance(weak_model=tiny("unet", seed=7)))
    options = repr(main.model_options)
    runs = []
    noted = tools.with_wrapper(main, "outer_sample", lambda executor, *args, **more: (
        runs.append(weakref.ref(executor.class_obj.model_options["transformer_options"][RUN])), executor(*args, **more)
    )[1])  # fmt: skip
    run(noted)
    gc.collect()
    assert runs[0]() is None
    assert repr(main.model_options) == options
    assert RUN not in main.model_options["transformer_options"]


def test_the_log_belongs_to_the_plan():
    model = tiny("unet")
    one, two = attach(model, APG()), attach(model, APG())
    assert log_of(one) is None
    run(one)
    assert log_of(one).nfe == 2 * STEPS
    assert log_of(two) is None
    assert log_of(one.clone()) is log_of(one)
    plan = weakref.ref(plan_of(one.model_options))
    del one
    gc.collect()
    assert plan() is None


def test_curves_of_the_log():
    model = tiny("unet")
    main = guided(model, *tools.all_rules("unet"), GuidanceInterval(end_percent=0.5))
    sample(main, steps=6, sampler="heun", latent=small(model))
    log = log_of(main)
    names = {rule.name for rule in plan_of(main.model_options).rules[:3]}
    curves = tools.curves_of(log)
    assert set(curves) == {"CFG update", "cosine of cond and uncond", *names}
    inside = [i for i, sigma in enumerate(log.sigmas[:-1]) if sigma > float(model.model.model_sampling.percent_to_sigma(0.5))]
    assert list(curves["CFG update"]) == list(curves[APG.name]) == inside
    assert list(curves[Autoguidance.name]) == list(range(6))
    assert all(0 < value < 10 for value in curves["CFG update"].values())
    assert last_log(plan_of(main.model_options)) is log


def test_models_without_a_run_are_left_alone():
    """Some nodes evaluate a model outside of sampling, with the options that it carries."""
    model = tiny("unet")
    main = guided(model, APG(), pag(model))
    results = []
    for patcher in (model, main):
        options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        options["transformer_options"]["wrappers"] = patcher.wrappers
        patcher.pre_run()
        conds = [{"model_conds": {"c_crossattn": comfy.conds.CONDCrossAttn(tools.cond(1)[0][0])}, "uuid": "a"}]
        with torch.no_grad():
            results.append(comfy.samplers.calc_cond_batch(model.model, [conds], small(model) + 1, torch.ones(1), options)[0])
    assert torch.equal(*results)
