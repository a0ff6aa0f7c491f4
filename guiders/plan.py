"""GuidancePlan: the immutable list of rules a MODEL carries, and the three kinds of rule.

With D_c, D_u the conditional and unconditional denoised predictions and w the sampler's cfg, the engine computes

    D = D_c + shape((w - 1) (D_c - D_u)) + sum_k s_k (D_c - D_k)

where *shapers* make up ``shape``, *terms* the sum, and *policies* decide at each step whether D_u is evaluated at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from .branches import Branch
    from .run import Step

PLAN = "lodestar_plan"


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """Parameters of one method. Never holds anything that changes while sampling: that lives in a Run."""

    name: ClassVar[str]  # as the user reads it on the node
    start_percent: float = 0.0
    end_percent: float = 1.0

    @property
    @abstractmethod
    def neutral(self) -> bool:
        """Whether these settings change nothing, so that the engine leaves the rule out."""

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Predictions the rule needs besides the sampler's own."""
        return ()


class Shaper(Rule):
    """Reshapes the CFG update."""

    @abstractmethod
    def shape(self, update: Tensor, denoised: Tensor, step: Step) -> Tensor:
        """Return the new update for ``update`` = D_c - D_u (before the factor w - 1) and ``denoised`` = D_c, both [B, ...]."""


class Term(Rule):
    """Adds an update against the predictions of other branches."""

    @abstractmethod
    def add(self, denoised: Tensor, cond: Tensor, others: Mapping[Branch, Tensor], step: Step) -> Tensor:
        """Return the guided ``denoised`` given D_c = ``cond`` and the D_k in ``others``, all [B, ...]."""


class Policy(Rule):
    """Decides which of the sampler's own predictions a step needs. Outside its window the CFG weight is 1."""


@dataclass(frozen=True, eq=False)
class GuidancePlan:
    """Rules in graph order. Compared by identity, so that a log can be found by the plan that a model carries."""

    rules: tuple[Rule, ...] = ()

    def __add__(self, rule: Rule) -> GuidancePlan:
        return GuidancePlan((*self.rules, rule))

    def active(self, kind: type[Rule]) -> list[tuple[int, Any]]:
        """The non-neutral rules of one kind with their position in the plan."""
        return [(index, rule) for index, rule in enumerate(self.rules) if isinstance(rule, kind) and not rule.neutral]


def plan_of(model_options: Mapping[str, Any]) -> GuidancePlan | None:
    """The plan that a model's options carry, if any."""
    return model_options.get("transformer_options", {}).get(PLAN)
