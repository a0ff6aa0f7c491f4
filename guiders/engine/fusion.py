"""The host's evaluation of the sampler's conds, with the branches that terms need in the same call.

Three steps: which lists of conds are left out, the call, and completion: the policies see the predictions, and what was left out is
filled in.

The branches' lists go in front of the host's own. The host fills a batch from the last list to the first, so that their rows come last,
and the first row labelled cond, the first uuid and so on are what they would be without us.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from .branches import branch_conds, with_control_views
from .choice import Choice
from .evaluation import FusedCall
from .host import PRE_CFG, combines_itself, is_dual_cfg, keeps_attention_of_uncond
from .rows import replace_rows
from .run import Run
from .step import Point

Calc = Callable[[list, Tensor, Tensor, dict[str, Any]], list[Tensor]]


def evaluate(run: Run, calc: Calc, lists: list, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """The host's evaluation ``calc`` of its lists of conds, and of what this evaluation needs besides; returns the host's part alone."""
    evaluation, index = run.evaluation, _index_of(run, "positive", lists)
    if index is None or evaluation.served:  # not the sampler's own evaluation, or another one after it
        return _uncond_apart(run, calc, lists, x, timestep, options)
    evaluation.served = True
    asked = _leave_out(run, lists, index, options)
    evaluation.guides = bool(asked.others)
    evaluation.awaits_uncond = not asked.others and _is_guided(run, options)
    out = _call(run, calc, asked, x, timestep, options)
    if not evaluation.awaits_uncond:
        _complete(run, asked, out, x, timestep)
    return out


def _index_of(run: Run, name: str, lists: list) -> int | None:
    """Which of the lists of conds is the guider's positive or negative one."""
    own = run.guider.conds.get(name)
    return next((i for i, conds in enumerate(lists) if conds is not None and conds is own), None)


def _is_guided(run: Run, options: dict[str, Any]) -> bool:
    """Whether an ordinary guider combines two predictions in this evaluation."""
    guider = run.guider
    if is_dual_cfg(guider) or not guider.conds.get("negative"):
        return False
    return guider.cfg != 1 or bool(options.get("disable_cfg1_optimization"))


def _uncond_apart(run: Run, calc: Calc, lists: list, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """A call after the sampler's own, or before it. Some packs ask for D_u in a call of its own, after the one for D_c."""
    evaluation, index = run.evaluation, _index_of(run, "negative", lists)
    if index is None or not evaluation.awaits_uncond:
        evaluation.uncond_first = evaluation.uncond_first or (index is not None and not evaluation.served)
        return calc(lists, x, timestep, options)
    evaluation.awaits_uncond, evaluation.guides = False, True
    wanted = evaluation.choice.evaluated
    run.count_saved(1, wanted)
    with evaluation.calling(FusedCall(rows=(wanted,) * len(lists))):
        out = calc([conds if wanted or i != index else None for i, conds in enumerate(lists)], x, timestep, options)
    _complete(run, _Asked(lists, -1, [index], False), out, x, timestep)
    return out


class WindowedBranches:
    """A context-window handler with our branches in its calls, so that they are windowed and blended like the rest."""

    def __init__(self, handler: Any, run: Run) -> None:
        self.handler, self.run = handler, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handler, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> WindowedBranches:
        return WindowedBranches(copy.deepcopy(self.handler, memo), self.run)

    def execute(self, calc: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict[str, Any], **kwargs: Any) -> list:
        """The handler's own call with the branches among its conds."""
        inner = partial(self.handler.execute, calc, model)
        return evaluate(self.run, partial(inner, **kwargs), conds, x, timestep, options)


@dataclass(frozen=True)
class _Asked:
    """The lists of conds that the sampler asks for, None in place of those that are left out.

    positive: the index of the positive list. others: those of the rest, left out or not; the first one is the unconditional.
    uncond_alone: whether the positive list is left out.
    """

    lists: list
    positive: int
    others: list[int]
    uncond_alone: bool


def _leave_out(run: Run, lists: list, positive: int, options: dict[str, Any]) -> _Asked:
    """Which lists the policies' choice needs, and the count of what it saves."""
    lists = _without_weightless(run, lists, options)
    others = [i for i, conds in enumerate(lists) if conds is not None and i != positive]
    if others and combines_itself(run.guider) and not options.get("disable_cfg1_optimization"):
        run.leave_out_at_weight_1()
    choice = run.evaluation.choice
    uncond_alone = bool(others) and choice == Choice(weight=0) and not run.evaluation.branches
    evaluated = choice.evaluated or keeps_attention_of_uncond(run.guider.model_options)
    left_out = [positive] if uncond_alone else [] if evaluated else others
    if run.evaluation.at_weight_1 and not others:
        run.count_saved(len(run.guider.conds) - 1, False)
    run.count_saved(1 if uncond_alone else len(others), not uncond_alone and evaluated)
    return _Asked([None if i in left_out else conds for i, conds in enumerate(lists)], positive, others, uncond_alone)


def _without_weightless(run: Run, lists: list, options: dict[str, Any]) -> list:
    """Drop the lists of a dual-CFG guider whose weights a policy has set to 1; the host itself drops only some of them."""
    if not run.policies or not is_dual_cfg(run.guider) or options.get("disable_cfg1_optimization"):
        return lists
    if run.guider.cfg1 != 1.0 or run.guider.cfg2 != 1.0:
        return lists
    return [conds if conds is run.guider.conds["positive"] else None for conds in lists]


def _call(run: Run, calc: Calc, asked: _Asked, x: Tensor, timestep: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """Evaluate; the branches' predictions and D_c go into the Evaluation, the host's part is returned."""
    evaluation, choice = run.evaluation, run.evaluation.choice
    own = tuple(branch for branch in evaluation.branches if branch.model is None)
    rows = (choice.terms,) * len(own) + tuple(i == asked.positive or choice.evaluated for i in range(len(asked.lists)))
    call, lists = FusedCall(own, asked.positive, rows), asked.lists
    if own:
        positive = run.guider.conds["positive"]
        lists = with_control_views([*(branch_conds(positive, branch) for branch in own), *lists], call.host_labels)
    with evaluation.calling(call):
        out = calc(lists, x, timestep, options)
    extra, out = out[: len(own)], out[len(own) :]
    if asked.uncond_alone:
        out[asked.positive] = out[asked.others[0]].clone()
    cond = out[asked.positive]
    evaluation.cond = cond.clone() if options.get(PRE_CFG) else cond  # such functions may write into what they get
    evaluation.others = dict(zip(own, extra, strict=True))
    evaluation.point = Point(x, timestep, run.guider.model_patcher.model, run.guider.conds["positive"], partial(_again, run, calc, options))
    for branch in evaluation.branches:
        if branch.model is not None:
            evaluation.others[branch] = run.weak_models[branch.model].predict(x, timestep, choice.terms)
    return out


def _again(run: Run, calc: Calc, options: dict[str, Any], conds: list, x: Tensor, timestep: Tensor) -> Tensor:
    """One prediction more in the same evaluation, without branches."""
    with run.evaluation.calling(FusedCall()):
        return calc([conds], x, timestep, options)[0]


def _complete(run: Run, asked: _Asked, out: list[Tensor], x: Tensor, timestep: Tensor) -> None:
    """Show the policies what was evaluated, and fill in what was not: a prediction, or D_c where there is no guidance."""
    evaluation, others = run.evaluation, asked.others
    evaluated = evaluation.choice.evaluated
    for i in others:
        out[i] = replace_rows(out[i], evaluated, evaluation.cond)
    cond = None if asked.uncond_alone else evaluation.cond
    uncond = out[others[0]] if others and evaluated else None
    run.record_predictions(cond, uncond)
    predictors = [index for index, choice in evaluation.choices.items() if choice.predicted]
    for index, policy in run.policies:
        run.narrow(index, policy.observe(cond, uncond, x, timestep, run.step_of(index)))
    for i in others:
        for index in predictors:
            out[i] = run.plan.rules[index].predict(evaluation.cond, x, timestep, run.step_of(index))
        out[i] = replace_rows(out[i], evaluation.choice.uncond, evaluation.cond)
