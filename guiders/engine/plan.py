"""GuidancePlan: the immutable list of rules a MODEL carries, and the three kinds of rule.

With D_c, D_u the conditional and unconditional denoised predictions and w the sampler's cfg, the engine computes

    D = D_c + shape((w - 1) (D_c - D_u)) + sum_k s_k (D_c - D_k)

where *shapers* make up ``shape``, *terms* the sum, and *policies* decide at each step and for each row of the batch what is evaluated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from .branches import Branch
    from .run import RunLog, Step

PLAN = "lodestar_plan"
CFG_UPDATE = "CFG update"  # a curve's label


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
    def curve(self) -> str | None:
        """Label of the curve that shows what the rule does; None: that of its own update, which bears its name."""
        return None

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Predictions the rule needs besides the sampler's own."""
        return ()


class Shaper(Rule):
    """Reshapes the CFG update."""

    def check(self, shape: Sequence[int]) -> None:
        """Raise ValueError before sampling starts if the rule cannot work on latents of this shape."""

    @abstractmethod
    def shape(self, update: Tensor, denoised: Tensor, step: Step) -> Tensor:
        """Return the new update for ``update`` = D_c - D_u (before the factor w - 1) and ``denoised`` = D_c, both [B, ...].

        An update that stays as it is has to be ``update`` itself: that keeps every bit of CFG.
        """


class Term(Rule):
    """Adds an update against the predictions of other branches."""

    @abstractmethod
    def add(self, denoised: Tensor, cond: Tensor, others: Mapping[Branch, Tensor], step: Step) -> Tensor:
        """Return the guided ``denoised`` given D_c = ``cond`` and the D_k in ``others``, all [B, ...]."""


Rows = bool | tuple[bool, ...]  # all rows of the batch, none, or one bool per row


def common(a: Rows, b: Rows) -> Rows:
    """The rows that are in both."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    rows = tuple(p and q for p, q in zip(a, b, strict=True))
    return rows if any(rows) else False


@dataclass(frozen=True)
class Choice:
    """What one evaluation computes.

    weight: the CFG weight in place of the sampler's; 1 is D_c alone, 0 is D_u alone, and neither costs the other's evaluation.
    uncond: the rows that are guided; the others are D_c and cost no evaluation of D_u.
    predicted: whether D_u is not evaluated for any row, but made by ``Policy.predict``.
    terms: the rows to which terms are added; the branches of the others are not evaluated.
    """

    weight: float | None = None
    uncond: Rows = True
    predicted: bool = False
    terms: Rows = True

    def __and__(self, other: Choice) -> Choice:
        """What is left where both are to hold: every rule may take evaluations away."""
        weights = [weight for weight in (self.weight, other.weight) if weight is not None]
        weight = 1.0 if 1 in weights else next(iter(weights), None)
        predicted = self.predicted or other.predicted
        return Choice(weight, common(self.uncond, other.uncond), predicted, common(self.terms, other.terms))

    @property
    def evaluated(self) -> Rows:
        """The rows whose D_u the model computes."""
        return False if self.predicted else self.uncond


class Policy(Rule):
    """Decides what is evaluated. Several policies add to each other's savings; those with the same ``claims`` exclude each other."""

    claims: ClassVar[str] = ""  # what no second policy may decide, as it reads after "both decide"

    @property
    def curve(self) -> str | None:
        """A policy has no update of its own: that of CFG, with gaps where there is none."""
        return CFG_UPDATE

    def check(self, guider: Any, sampler: Any, sigmas: Tensor) -> None:
        """Raise ValueError, before sampling starts, where the policy cannot work with this guider, sampler or schedule [T + 1]."""

    @abstractmethod
    def choose(self, step: Step) -> Choice:
        """What the evaluation that now begins computes; ``step.first`` tells the first one of a solver step from its further stages."""

    def observe(self, cond: Tensor | None, uncond: Tensor | None, x: Tensor, sigma: Tensor, step: Step) -> Choice | None:
        """See D_c and D_u [B, ...] (None where not evaluated) at x [B, ...], sigma [B].

        May return a choice that narrows the one of this evaluation: its rows lose D_u and terms, although these have been paid for.
        """

    def predict(self, cond: Tensor, x: Tensor, sigma: Tensor, step: Step) -> Tensor:
        """D_u [B, ...] given D_c; asked for where ``choose`` said ``predicted``."""
        raise NotImplementedError

    def note(self, memory: dict[str, Any], log: RunLog) -> None:
        """Write into the log what users should see, at the end of a run or while it goes on; without a wait for the device."""


@dataclass(frozen=True, eq=False)
class GuidancePlan:
    """Rules in graph order. Compared by identity, so that a log can be found by the plan that a model carries.

    nodes: for every rule the node of the graph that it comes from, if known, to show there what the rule does.
    """

    rules: tuple[Rule, ...] = ()
    nodes: tuple[str | None, ...] = ()

    def plus(self, rule: Rule, node: str | None = None) -> GuidancePlan:
        """The plan with one rule more."""
        return GuidancePlan((*self.rules, rule), (*self.nodes, node))

    def active(self, kind: type[Rule]) -> list[tuple[int, Any]]:
        """The non-neutral rules of one kind with their position in the plan."""
        return [(index, rule) for index, rule in enumerate(self.rules) if isinstance(rule, kind) and not rule.neutral]


def plan_of(model_options: Mapping[str, Any]) -> GuidancePlan | None:
    """The plan that a model's options carry, if any."""
    return model_options.get("transformer_options", {}).get(PLAN)
