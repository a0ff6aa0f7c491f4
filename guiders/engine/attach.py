"""Rules on a MODEL: a clone with the rule in its plan, and a clone without a plan."""

from __future__ import annotations

from functools import partial
from typing import Any

from .host import refuse_foreign_cfg
from .keys import LODESTAR, PLAN
from .plan import GuidancePlan, Policy, Rule, Shaper, Term, plan_of
from .wrappers import WRAPPERS, post_cfg_term


def attach(model: Any, rule: Rule | None = None, node: str | None = None) -> Any:
    """Clone a MODEL and add a rule to its plan, with the node of the graph that it comes from; without a rule, runs are only counted.

    Raises ValueError when the rule shapes the CFG update and another pack has already claimed that, or when it decides what another
    rule of the plan decides.
    """
    if rule is not None and isinstance(rule, Shaper) and not rule.neutral:
        refuse_foreign_cfg(rule.name, model.model_options)
    clone = model.clone()
    plan = plan_of(clone.model_options)
    if plan is None:
        plan = GuidancePlan()
        for kind, wrapper in WRAPPERS.items():
            clone.add_wrapper_with_key(kind, LODESTAR, wrapper)
    if rule is not None:
        _refuse_second(rule, plan)
        if isinstance(rule, Term):  # our place among other packs' post-CFG functions is the place of the node in the graph
            clone.set_model_sampler_post_cfg_function(partial(post_cfg_term, len(plan.rules)))
        plan = plan.plus(rule, node)
        weak = [branch.model for branch in rule.branches if branch.model is not None]
        if weak and not rule.neutral:
            clone.set_additional_models(LODESTAR, [*clone.get_additional_models_with_key(LODESTAR), *weak])
    clone.model_options["transformer_options"][PLAN] = plan
    return clone


def detach(model: Any) -> Any:
    """Clone a MODEL without its plan."""
    clone = model.clone()
    for kind in WRAPPERS:
        clone.remove_wrappers_with_key(kind, LODESTAR)
    clone.model_options["transformer_options"].pop(PLAN, None)
    return clone


def _refuse_second(rule: Rule, plan: GuidancePlan) -> None:
    if not isinstance(rule, Policy) or not rule.claims or rule.neutral:
        return
    for _, other in plan.active(Policy):
        if other.claims == rule.claims:
            raise ValueError(f"{other.name} and {rule.name} both decide {rule.claims}; bypass one of the two nodes.")
