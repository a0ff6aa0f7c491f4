"""Refusals: what cannot work is said in one sentence, before sampling starts.

``check_start`` is the list that the engine goes through at the start of a run, and Compare Guidance before its first run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .host import cfg_slot_owner, combines_itself, is_dual_cfg, is_known_to_combine, reads_uncond
from .plan import GuidancePlan, Policy, Rule, Shaper, Term
from .run import Run
from .start import Start


def check_start(plan: GuidancePlan, start: Start) -> None:
    """Raise ValueError for the first thing because of which the plan cannot work in this sampling call."""
    shapers = [rule for _, rule in plan.active(Shaper)]
    policies = [rule for _, rule in plan.active(Policy)]
    terms = [rule for _, rule in plan.active(Term)]
    if is_known_to_combine(start.guider) and not is_dual_cfg(start.guider):  # whose combination is made of the host's CFG function
        for rule in (*shapers, *policies):
            refuse_own_combination(rule.name, start.guider)
    for rule in policies:
        _refuse_without_cfg(rule.name, start.guider)
    for rule in (*policies, *shapers, *terms):
        rule.check(start)
    for rule in shapers:
        refuse_foreign_cfg(rule.name, start.guider.model_options)
        refuse_lambda(rule.name, reads_uncond(start.sampler))


def check_evaluated(run: Run) -> None:
    """After the first evaluation: raise ValueError for what has turned out not to work with this guider, or with another pack."""
    guider, evaluation = run.guider, run.evaluation
    if combines_itself(guider) and not is_dual_cfg(guider) and evaluation.shaped is None:
        for _, rule in run.shapers:
            refuse_own_combination(rule.name, guider)
    if not evaluation.served or (evaluation.awaits_uncond and evaluation.uncond_first):
        for _, rule in run.policies:
            if type(rule).observe is not Policy.observe:
                raise ValueError(
                    f"{rule.name} compares the predictions for the positive and the negative prompt, and another node on the model, or the "
                    f"guider {type(guider).__name__}, evaluates the two in a way that it cannot follow: bypass that node, or {rule.name}."
                )


def _refuse_without_cfg(name: str, guider: Any) -> None:
    """Raise ValueError for guiders of other packs without a cfg that a policy could change."""
    if not isinstance(getattr(guider, "cfg", None), (int, float)):
        raise ValueError(
            f"{name} changes the cfg of a guider, and that of {type(guider).__name__} is not one number: use a CFGGuider instead, or "
            f"bypass {name}."
        )


def check_attached(plan: GuidancePlan, rule: Rule, model_options: Mapping[str, Any]) -> None:
    """Raise ValueError where a rule cannot be added to the plan of a model with these options."""
    if rule.neutral:
        return
    if isinstance(rule, Shaper):
        refuse_foreign_cfg(rule.name, model_options)
    for _, other in plan.active(Policy):
        if isinstance(rule, Policy) and rule.claims and other.claims == rule.claims:
            raise ValueError(f"{other.name} and {rule.name} both decide {rule.claims}; bypass one of the two nodes.")


def refuse_foreign_cfg(name: str, model_options: Mapping[str, Any]) -> None:
    """Raise ValueError where another pack has claimed the CFG slot, which ``name`` needs."""
    owner = cfg_slot_owner(model_options)
    if owner is not None:
        raise ValueError(f"{name} and {owner} both replace the CFG combination; bypass one of the two nodes.")


def refuse_lambda(name: str, sampler: str | None, remedy: str | None = None) -> None:
    """Raise ValueError where ``name`` reshapes the CFG update and the sampler is one of CFG++, as ``reads_uncond`` calls it."""
    if sampler is not None:
        raise ValueError(
            f"{name} and {sampler} do not combine: that one reshapes the update (cfg - 1)(D_c - D_u), and CFG++ has a lambda between "
            f"0 and 1 in place of cfg; use a sampler that is not CFG++, or {remedy or f'bypass {name}'}."
        )


def refuse_own_combination(name: str, guider: Any) -> None:
    """Raise ValueError for guiders that would drop what ``name`` does to the combination."""
    if combines_itself(guider):
        way = "combines the predictions itself" if is_known_to_combine(guider) else "has a way of its own to combine the predictions"
        raise ValueError(f"{name} cannot work with {type(guider).__name__}: that guider {way}. Use a CFGGuider instead, or bypass {name}.")


def refuse_dual_cfg(name: str, guider: Any) -> None:
    """Raise ValueError for guiders with two weights."""
    if is_dual_cfg(guider):
        raise ValueError(f"{name} takes one negative prompt and one cfg; use KSampler or CFGGuider instead of DualCFGGuider.")


def refuse_uncond_readers(name: str, sampler: Any) -> None:
    """Raise ValueError for samplers that use D_u themselves (CFG++), where ``name`` leaves D_u out or imitates it."""
    reader = reads_uncond(sampler)
    if reader is not None:
        raise ValueError(
            f"{name} cannot work with the sampler {reader}: its steps use the unconditional prediction and need it at every step. "
            f"Choose a sampler that is not CFG++, or bypass {name}."
        )
