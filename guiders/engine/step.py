"""Step: where a model evaluation stands in the schedule, as a rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..spaces import Layout
from .curves import Quantity


@dataclass(frozen=True, eq=False)
class Point:
    """What the model is asked for in an evaluation, and how to ask again, for terms that need its gradient.

    x: the noisy point [B, ...]. sigma: its level [B]. model: the host's. conds: the list of positive ones.
    evaluate: D_c [B, ...] for other conds, x and sigma; gradients go through it, and it counts as an evaluation.
    """

    x: Tensor
    sigma: Tensor
    model: Any
    conds: Sequence[dict[str, Any]]
    evaluate: Callable[[Sequence[dict[str, Any]], Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """Where a model evaluation stands. ``memory`` belongs to the rule it is handed to and lives as long as the run.

    index: position in the schedule of the solver step, the same for all its stages.
    sigma: noise level at the start of that step.
    first: whether this is the first evaluation of the step.
    covered: whether the step starts inside the rule's window.
    flow: whether the model's path is x = (1 - t) x0 + t noise.
    reads_uncond: whether the sampler's own steps use D_u, so that a weight of 1 alone does not leave it out.
    record: keeps a curve's values, one for each row, for this step.
    point: what the model was asked for; None until it has answered.
    next_sigma: noise level at the end of the step. steps: of the schedule.
    spend: counts what a rule spends besides evaluations, by its name, for a number of rows.
    """

    index: int
    sigma: float
    first: bool
    layout: Layout
    memory: dict[str, Any] = field(default_factory=dict)
    covered: bool = True
    flow: bool = False
    reads_uncond: bool = False
    record: Callable[[Quantity, Tensor], None] = lambda quantity, values: None
    point: Point | None = None
    next_sigma: float = 0.0
    steps: int = 1
    spend: Callable[[str, int], None] = lambda name, rows: None
