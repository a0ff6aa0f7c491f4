"""The combination of the predictions: shapers in the host's CFG slot, terms behind it.

D = D_c + (w - 1) shape(D_c - D_u) + sum_k s_k (D_c - D_k) + sum_j v_j
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .host import combines_itself
from .rows import replace_rows
from .run import Run, run_of


def shape_cfg(run: Run, args: dict[str, Any]) -> Tensor:
    """The host's CFG slot: D_c + (w - 1) shape(D_c - D_u), returned as the residual x - D that the slot asks for."""
    cond, uncond, w = args["cond_denoised"], args["uncond_denoised"], args.get("cond_scale", run.guider.cfg)
    choice, denoised = run.evaluation.choice, cond
    if _has_uncond(run, args) and w != 1 and choice.uncond:
        update = plain = cond - uncond
        shapers = [(index, shaper) for index, shaper in run.shapers if run.covers(index) and choice.weight != 0]
        for index, shaper in shapers:
            update = shaper.shape(update, cond, w, run.step_of(index))
            run.record_update(index, cond, cond + (w - 1) * update)
        guided = uncond + update * w if update is plain else cond + (w - 1) * update  # the first keeps every bit of the host's CFG
        denoised = replace_rows(guided, choice.uncond, cond)
    run.evaluation.shaped = cond.clone() if denoised is cond else denoised  # post-CFG functions may write into it
    return args["input"] - denoised


def _has_uncond(run: Run, args: dict[str, Any]) -> bool:
    """Whether there is a D_u. The host says so; a pack that replaces its ``sampling_function`` may not, but the run has seen it."""
    return args["input_uncond"] is not None if "input_uncond" in args else run.evaluation.guides


def exact_cfg(run: Run, args: dict[str, Any]) -> Tensor:
    """First post-CFG function: hand on the shaped prediction itself, since x - (x - D) is D only up to rounding."""
    shaped = run.evaluation.shaped
    return args["denoised"] if shaped is None else shaped


def post_cfg_term(index: int, args: dict[str, Any]) -> Tensor:
    """Post-CFG function: the update of the term that is rule number ``index`` of the plan."""
    run = run_of(args["model_options"])
    if run is None or combines_itself(run.guider):
        return args["denoised"]
    return add_term(run, index, args["denoised"])


def add_term(run: Run, index: int, denoised: Tensor) -> Tensor:
    """The guided ``denoised`` [B, ...] with the update of one more term."""
    term, evaluation = run.plan.rules[index], run.evaluation
    if term.neutral or not run.covers(index) or not evaluation.choice.terms:
        return denoised
    if evaluation.cond is None:
        raise RuntimeError(f"{term.name} found no conditional prediction: another node replaces the host's evaluation of the conds.")
    guided = term.add(denoised, evaluation.cond, evaluation.others, run.step_of(index))
    guided = replace_rows(guided, evaluation.choice.terms, denoised)
    run.record_update(index, denoised, guided)
    return guided
