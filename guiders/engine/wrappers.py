"""The host wrappers that run a plan. ``attach`` installs them once per MODEL, whatever the number of rules.

A sampling call goes through them from the outside in:

    OUTER_SAMPLE     checks the plan against the guider, makes the Run, installs what the run needs
    SAMPLER_SAMPLE   prepares the weak models' conditioning
    PREDICT_NOISE    begins an Evaluation: finds the step, asks the policies; adds terms for guiders that combine predictions themselves
    CALC_COND_BATCH  adds branches to the host's call, so that everything of one model goes through it together (fusion.py)
    APPLY_MODEL      leaves out rows, counts, applies variants to the rows of their branches (rows.py); inside all others, computes what
                     branches have in common once (sharing.py)

On the way back the predictions go through the CFG slot and the post-CFG functions (combination.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from . import telemetry
from .checks import check_evaluated, check_start
from .combination import add_term, exact_cfg, shape_cfg
from .fusion import WindowedBranches, evaluate
from .host import CFG_SLOT, CFG_WEIGHTS, POST_CFG, combines_itself, reads_uncond
from .keys import LODESTAR, RUN, SHARED
from .plan import plan_of
from .rows import apply_model, call_model, outermost, with_host_labels
from .run import Run, run_of
from .schedule import call_sampler
from .second_model import WeakModel
from .sharing import share
from .start import Start


def _outer_sample(executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    plan = plan_of(guider.model_options)
    check_start(plan, Start(guider, sampler, sigmas, tuple(noise.shape)))
    run = Run(plan, guider, sigmas, tuple(noise.shape), kwargs.get("latent_shapes"))
    run.reads_uncond = reads_uncond(sampler) is not None
    run.watcher = telemetry.of_run(run)
    _install(run, guider.model_options)
    try:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        run.finish()


def _install(run: Run, options: dict[str, Any]) -> None:
    """Put what a run needs into its model options, which the host has cloned for this sampling call."""
    options["transformer_options"][RUN] = run
    if run.shapers:
        options[CFG_SLOT] = partial(shape_cfg, run)
        options[POST_CFG] = [partial(exact_cfg, run), *options.get(POST_CFG, [])]
    if options.get("context_handler") is not None:
        options["context_handler"] = WindowedBranches(options["context_handler"], run)
    options["model_function_wrapper"] = partial(with_host_labels, run, options.get("model_function_wrapper", call_model))
    wrappers = options["transformer_options"]["wrappers"]
    for kind in (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL):
        wrappers[kind] = outermost(wrappers[kind], wrappers[kind][LODESTAR])
    wrappers[WrappersMP.APPLY_MODEL] = {**wrappers[WrappersMP.APPLY_MODEL], SHARED: [share]}


def _sampler_sample(executor: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    run = run_of(extra_args["model_options"])
    models = {id(b.model): b.model for _, term in run.terms for b in term.branches if b.model is not None}
    prepared: list[WeakModel] = []
    run.begin_sampling()
    try:
        for model in models.values():
            prepared.append(WeakModel(model, run, extra_args, *args[1:4], **kwargs))
            run.weak_models[model] = prepared[-1]
        return call_sampler(executor, guider, sigmas, extra_args, *args, **kwargs)
    finally:
        run.weak_models.clear()  # they know the run: without this, both would live on until Python looks for circles
        for weak in prepared:
            weak.finish()


def _predict_noise(executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    guider = executor.class_obj
    run = run_of(guider.model_options)
    is_first = not run.position.begun
    evaluation = run.begin_evaluation(timestep)
    weight = evaluation.choice.weight
    saved = {name: getattr(guider, name) for name in CFG_WEIGHTS if hasattr(guider, name)}
    if weight is not None and guider.conds.get("negative") is not None:
        evaluation.at_weight_1 = weight == 1 and any(value != 1 for value in saved.values())
        for name in saved:
            setattr(guider, name, weight)
    try:
        denoised = executor(x, timestep, *args, **kwargs)
    finally:
        for name, value in saved.items():
            setattr(guider, name, value)
    if is_first:
        check_evaluated(run)
    if combines_itself(guider) and evaluation.cond is not None:
        for index, _ in run.terms:
            denoised = add_term(run, index, denoised)
    if run.watcher is not None:
        run.watcher.evaluated(run)
    return denoised


def _calc_cond_batch(executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    run = run_of(options)
    if run is None:  # called outside of a sampling run
        return executor(model, conds, x, timestep, options)
    return evaluate(run, partial(executor, model), conds, x, timestep, options)


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: _outer_sample,
    WrappersMP.SAMPLER_SAMPLE: _sampler_sample,
    WrappersMP.PREDICT_NOISE: _predict_noise,
    WrappersMP.CALC_COND_BATCH: _calc_cond_batch,
    WrappersMP.APPLY_MODEL: apply_model,
}
