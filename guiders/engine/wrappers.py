"""The host wrappers that run a plan. ``attach`` installs them once per MODEL, whatever the number of rules.

A sampling call goes through them from the outside in:

    OUTER_SAMPLE     makes the Run, checks the plan against the guider, installs what the run needs
    SAMPLER_SAMPLE   prepares the weak models' conditioning
    PREDICT_NOISE    finds the step, decides what to evaluate; adds terms for guiders that combine predictions themselves
    CALC_COND_BATCH  adds branches to the host's call, so that everything of one model goes through it together
    APPLY_MODEL      leaves out rows, counts, applies variants to the rows of their branches (rows.py)

Extra branches go in front of the host's own. The host fills a batch from the last to the first, so that their rows come last, and the
first row labelled cond, the first uuid and so on are what they would be without us.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from . import telemetry
from .branches import branch_conds, with_control_views
from .choice import Choice
from .host import CFG_SLOT, POST_CFG, refuse_foreign_cfg
from .keys import LODESTAR, RUN
from .plan import plan_of
from .rows import apply_model, call_model, outermost, replace_rows, with_host_labels
from .run import Run, run_of
from .second_model import Weak

_CFGS = ("cfg", "cfg1", "cfg2")  # the weights of the host's own guiders
_DUAL_CFG = "Guider_DualCFG"  # has a combination of its own, but made of the host's CFG function


def _outer_sample(executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    options = guider.model_options
    plan = plan_of(options)
    run = Run(plan, guider, sigmas, tuple(noise.shape), kwargs.get("latent_shapes"))
    _check_guider(run)
    for _, policy in run.policies:
        policy.check(guider, sampler, sigmas)
    run.watcher = telemetry.of_run(run, sampler)
    options["transformer_options"][RUN] = run
    for _, rule in run.shapers:
        rule.check(noise.shape)
    if run.shapers:
        refuse_foreign_cfg(run.shapers[0][1].name, options)
        options[CFG_SLOT] = partial(_shape_cfg, run)
        options[POST_CFG] = [partial(_exact_cfg, run), *options.get(POST_CFG, [])]
    if options.get("context_handler") is not None:
        options["context_handler"] = _WindowedBranches(options["context_handler"], run)
    options["model_function_wrapper"] = partial(with_host_labels, run, options.get("model_function_wrapper", call_model))
    wrappers = options["transformer_options"]["wrappers"]
    for kind in (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL):
        wrappers[kind] = outermost(wrappers[kind], wrappers[kind][LODESTAR])
    try:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        run.finish()
        if run.watcher is not None:
            run.watcher.finish(run)


def _check_guider(run: Run) -> None:
    """Refuse rules that a guider with a combination of its own would silently drop."""
    if _standard(run.guider) or _DUAL_CFG in (cls.__name__ for cls in type(run.guider).__mro__):
        return
    for _, rule in (*run.shapers, *run.policies):
        raise ValueError(
            f"{rule.name} cannot work with {type(run.guider).__name__}: that guider combines the predictions itself. "
            f"Use KSampler or CFGGuider with it, or bypass {rule.name}."
        )


def _standard(guider: Any) -> bool:
    """Whether the guider combines predictions with the host's own sampling function."""
    return type(guider).predict_noise is comfy.samplers.CFGGuider.predict_noise


# --- the weak models -------------------------------------------------------------------------------------------------


def _sampler_sample(executor: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    run = run_of(extra_args["model_options"])
    models = {id(b.model): b.model for _, term in run.terms for b in term.branches if b.model is not None}
    prepared: list[Weak] = []
    try:
        for model in models.values():
            prepared.append(Weak(model, run, extra_args, *args[1:4], **kwargs))
            run.weak[model] = prepared[-1]
        return executor(guider, sigmas, extra_args, *args, **kwargs)
    finally:
        for weak in prepared:
            weak.finish()


# --- one evaluation --------------------------------------------------------------------------------------------------


def _predict_noise(executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    guider = executor.class_obj
    run = run_of(guider.model_options)
    run.begin_evaluation(timestep)
    saved = {name: getattr(guider, name) for name in _CFGS if hasattr(guider, name)}
    if run.choice.weight is not None and guider.conds.get("negative") is not None:
        run.stopped = run.choice.weight == 1 and any(value != 1 for value in saved.values())
        for name in saved:
            setattr(guider, name, run.choice.weight)
    try:
        denoised = executor(x, timestep, *args, **kwargs)
    finally:
        for name, value in saved.items():
            setattr(guider, name, value)
    if not _standard(guider) and run.cond is not None:
        for index, _ in run.terms:
            denoised = _add_term(run, index, denoised)
    if run.watcher is not None:
        run.watcher.step(run)
    return denoised


def _calc_cond_batch(executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    run = run_of(options)
    if run is None:  # called outside of a sampling run
        return executor(model, conds, x, timestep, options)
    return _evaluate(run, partial(executor, model), conds, x, timestep, options)


class _WindowedBranches:
    """A context-window handler with our branches added in front of it, so that they are windowed and blended like the rest."""

    def __init__(self, handler: Any, run: Run) -> None:
        self.handler, self.run = handler, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handler, name)

    def execute(self, calc: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any], **kwargs: Any) -> list:
        """The handler's own call with the extra branches among its conds."""
        inner = partial(self.handler.execute, calc, model)
        return _evaluate(self.run, partial(inner, **kwargs), conds, x, timestep, options)


def _evaluate(run: Run, calc: Callable, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """The host's evaluation of ``conds`` together with the branches that this step wants; returns the host's part alone."""
    positive = run.guider.conds.get("positive")
    place = next((i for i, lane_ in enumerate(conds) if lane_ is not None and lane_ is positive), None)
    if place is None or run.cond is not None:  # not the sampler's own evaluation, or this evaluation has been served
        return calc(conds, x, timestep, options)
    lanes = _without_weightless(run, conds, options)
    rest = [i for i, lane_ in enumerate(lanes) if lane_ is not None and i != place]
    alone = bool(rest) and run.choice == Choice(weight=0) and not run.wanted  # D_u alone
    left_out = [place] if alone else [] if run.choice.evaluated else rest
    if run.stopped and not rest:
        run.count_saved(len(run.guider.conds) - 1, False)
    run.count_saved(1 if alone else len(rest), not alone and run.choice.evaluated)
    lanes = [None if i in left_out else lane_ for i, lane_ in enumerate(lanes)]
    own = [branch for branch in run.wanted if branch.model is None]
    needed = [run.choice.terms] * len(own) + [i == place or run.choice.evaluated for i in range(len(lanes))]
    if own:
        lanes = with_control_views([*(branch_conds(positive, branch) for branch in own), *lanes], run.host_labels)
    run.cond = x  # from here on nested and further calls of this evaluation pass through
    with run.in_front(own, place), run.only(*needed):
        out = calc(lanes, x, timestep, options)
    extra, out = out[: len(own)], out[len(own) :]
    if alone:
        out[place] = out[rest[0]].clone()
    run.cond, run.others = out[place], dict(zip(own, extra, strict=True))
    for branch in run.wanted:
        if branch.model is not None:
            run.others[branch] = run.weak[branch.model].predict(x, timestep, run.choice.terms)
    _complete(run, out, None if alone else place, rest, x, timestep)
    return out


def _complete(run: Run, out: list[Tensor], place: int | None, rest: list[int], x: Tensor, timestep: Tensor) -> None:
    """Show the policies what was evaluated, and put in its place what was not: a prediction, or D_c where there is no guidance."""
    evaluated = run.choice.evaluated
    for i in rest:
        out[i] = replace_rows(out[i], evaluated, run.cond)
    cond = None if place is None else run.cond
    uncond = out[rest[0]] if rest and evaluated else None
    run.record_predictions(cond, uncond)
    predictors = [index for index in run.choices if run.choices[index].predicted]
    for index, policy in run.policies:
        run.narrow(index, policy.observe(cond, uncond, x, timestep, run.step(index)))
    for i in rest:
        for index in predictors:
            out[i] = run.plan.rules[index].predict(run.cond, x, timestep, run.step(index))
        out[i] = replace_rows(out[i], run.choice.uncond, run.cond)


def _without_weightless(run: Run, conds: list, options: dict[str, Any]) -> list:
    """Drop lanes of a dual-CFG guider whose weights a policy has set to 1; the host itself drops only some of them."""
    if not run.policies or _standard(run.guider) or options.get("disable_cfg1_optimization"):
        return conds
    if run.guider.cfg1 != 1.0 or run.guider.cfg2 != 1.0:
        return conds
    return [lane_ if lane_ is run.guider.conds["positive"] else None for lane_ in conds]


# --- combination -----------------------------------------------------------------------------------------------------


def _shape_cfg(run: Run, args: dict[str, Any]) -> Tensor:
    """The host's CFG slot: D_c + (w - 1) shape(D_c - D_u), returned as the residual x - D that the slot asks for."""
    cond, uncond, w = args["cond_denoised"], args["uncond_denoised"], args["cond_scale"]
    denoised = cond
    if args.get("input_uncond") is not None and w != 1 and run.choice.uncond:
        update = plain = cond - uncond
        shapers = [(index, shaper) for index, shaper in run.shapers if run.covers(index) and run.choice.weight != 0]
        for index, shaper in shapers:
            update = shaper.shape(update, cond, w, run.step(index))
            run.record_update(index, cond, cond + (w - 1) * update)
        guided = uncond + update * w if update is plain else cond + (w - 1) * update
        denoised = replace_rows(guided, run.choice.uncond, cond)
    run.shaped = denoised
    return args["input"] - denoised


def _exact_cfg(run: Run, args: dict[str, Any]) -> Tensor:
    """First post-CFG function: hand on the shaped prediction itself, since x - (x - D) is D only up to rounding."""
    return args["denoised"] if run.shaped is None else run.shaped


def post_cfg_term(index: int, args: dict[str, Any]) -> Tensor:
    """Post-CFG function: add the term that is rule number ``index`` of the plan."""
    run = run_of(args["model_options"])
    if run is None or not _standard(run.guider):
        return args["denoised"]
    return _add_term(run, index, args["denoised"])


def _add_term(run: Run, index: int, denoised: Tensor) -> Tensor:
    term = run.plan.rules[index]
    if term.neutral or not run.covers(index) or not run.choice.terms:
        return denoised
    if run.cond is None:
        raise RuntimeError(f"{term.name} found no conditional prediction: another node replaces the host's evaluation of the conds.")
    guided = replace_rows(term.add(denoised, run.cond, run.others, run.step(index)), run.choice.terms, denoised)
    run.record_update(index, denoised, guided)
    return guided


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: _outer_sample,
    WrappersMP.SAMPLER_SAMPLE: _sampler_sample,
    WrappersMP.PREDICT_NOISE: _predict_noise,
    WrappersMP.CALC_COND_BATCH: _calc_cond_batch,
    WrappersMP.APPLY_MODEL: apply_model,
}
