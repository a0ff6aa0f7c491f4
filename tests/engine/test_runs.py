"""A run leaves nothing behind but its log, which belongs to the plan."""

from __future__ import annotations

import gc
import weakref

import tools
import torch
from tools import attach, comfy, empty_latent, guided, log_of, pag, sample, tiny

from lodestar.guiders.engine.keys import RUN
from lodestar.guiders.engine.log import last_log
from lodestar.guiders.engine.plan import plan_of
from lodestar.guiders.policies.adaptive import AdaptiveGuidance
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance

STEPS = 3


def small(model, batch: int = 1):
    return empty_latent(model, batch, 8)


def run(model, batch: int = 1, **more):
    return sample(model, steps=STEPS, latent=small(model, batch), **more)


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


def test_a_run_is_freed_at_its_end_without_a_garbage_collection():
    """Runs and weak models hold whole batches of tensors."""
    model, kept = tiny("unet"), []

    def note(args):
        found = args["model_options"]["transformer_options"][RUN]
        weak = list(found.weak_models.values())
        kept.extend(weakref.ref(thing) for thing in (found, found.evaluation, found.evaluation.cond, *weak))
        return args["denoised"]

    main = guided(model, APG(momentum=-0.5), pag(model), Autoguidance(weak_model=tiny("unet", seed=7)), AdaptiveGuidance(threshold=0.9))
    main.set_model_sampler_post_cfg_function(note)
    run(main)
    kept.clear()
    gc.collect()
    gc.disable()
    try:
        run(main)
        assert kept
        assert [thing() for thing in kept if thing() is not None] == []
    finally:
        gc.enable()


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
