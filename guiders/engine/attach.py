"""Rules on a MODEL: a clone with the rule in its plan, and a clone without a plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .checks import check_attached
from .combination import post_cfg_term
from .host import POST_CFG
from .keys import LODESTAR, PLAN
from .plan import GuidancePlan, Rule, Term, plan_of
from .wrappers import WRAPPERS


def attach(model: Any, rule: Rule | None = None, node: str | None = None) -> Any:
    """Clone a MODEL and add a rule to its plan, with the node of the graph that it comes from; without a rule, runs are only counted.

    Raises ValueError when the rule shapes the CFG update and another pack has already claimed that, or when it decides what another
    rule of the plan decides.
    """
    plan = plan_of(model.model_options) or GuidancePlan()
    if rule is not None:
        check_attached(plan, rule, model.model_options)
    clone = model.clone()
    if all(other.neutral for other in plan.rules):  # our place among other packs' wrappers is that of the first rule that does something
        for kind, wrapper in WRAPPERS.items():
            clone.remove_wrappers_with_key(kind, LODESTAR)
            clone.add_wrapper_with_key(kind, LODESTAR, wrapper)
    if isinstance(rule, Term):  # our place among other packs' post-CFG functions is the place of the node in the graph
        clone.set_model_sampler_post_cfg_function(partial(post_cfg_term, len(plan.rules)))
    if rule is not None:
        plan = plan.plus(rule, node)
        more = [*(branch.model for branch in rule.branches if branch.model is not None), *rule.models]
        if more and not rule.neutral:
            clone.set_additional_models(LODESTAR, [*clone.get_additional_models_with_key(LODESTAR), *more])
    clone.model_options["transformer_options"][PLAN] = plan
    return clone


def detach(model: Any) -> Any:
    """Clone a MODEL without its plan, and without all that ``attach`` has added for it."""
    clone = model.clone()
    for kind in WRAPPERS:
        clone.remove_wrappers_with_key(kind, LODESTAR)
        if not clone.wrappers.get(kind, True):  # the host compares the kinds of wrappers that two clones have
            del clone.wrappers[kind]
    clone.remove_additional_models(LODESTAR)
    options = clone.model_options
    options["transformer_options"].pop(PLAN, None)
    others = [function for function in options.get(POST_CFG, []) if not _is_ours(function)]
    if others:
        options[POST_CFG] = others
    else:
        options.pop(POST_CFG, None)
    return clone


def _is_ours(function: Callable) -> bool:
    return isinstance(function, partial) and function.func is post_cfg_term
