"""GuidancePlan: the immutable list of rules a MODEL carries, and the three kinds of rule.

With D_c, D_u the conditional and unconditional denoised predictions and w the sampler's cfg, the engine computes

    D = D_c + (w - 1) shape(D_c - D_u) + sum_k s_k (D_c - D_k) + sum_j v_j

where *shapers* make up ``shape``, *terms* the sums, and *policies* decide at each step and for each row of the batch what is evaluated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from .branches import Branch
from .choice import Choice
from .curves import CFG_UPDATE, Quantity
from .keys import PLAN
from .log import RunLog
from .start import Start
from .step import Step


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """Parameters of one method. Never holds anything that changes while sampling: that lives in a Run."""

    name: ClassVar[str]  # as the user reads it on the node
    short: ClassVar[str]  # as tables and pictures have it
    start_percent: float = 0.0
    end_percent: float = 1.0

    @property
    @abstractmethod
    def neutral(self) -> bool:
        """Whether these settings change nothing, so that the engine leaves the rule out."""

    def check(self, start: Start) -> None:  # noqa: B027, most rules work everywhere
        """Raise ValueError, before sampling starts, where the rule cannot work in this sampling call. See checks.py."""

    @property
    def curve(self) -> Quantity | None:
        """The curve that shows what the rule does; None: that of its own update, which bears its name."""
        return None

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Predictions the rule needs besides the sampler's own."""
        return ()

    @property
    def models(self) -> tuple[Any, ...]:
        """Further models, as the host's patchers, that it has to load together with the guided one."""
        return ()


class Shaper(Rule):
    """Reshapes the CFG update."""

    @abstractmethod
    def shape(self, update: Tensor, cond: Tensor, w: float, step: Step) -> Tensor:
        """Return the new update for ``update`` = D_c - D_u and ``cond`` = D_c, both [B, ...]. The engine multiplies it by w - 1.

        An update that stays as it is has to be ``update`` itself: that keeps every bit of CFG.
        """


class Term(Rule):
    """Adds an update: against the predictions of other branches, or a vector v."""

    @abstractmethod
    def add(self, denoised: Tensor, cond: Tensor, others: Mapping[Branch, Tensor], step: Step) -> Tensor:
        """Return the guided ``denoised`` given D_c = ``cond`` and the D_k in ``others``, all [B, ...]."""


class Policy(Rule):
    """Decides what is evaluated. Several policies add to each other's savings; those with the same ``claims`` exclude each other."""

    claims: ClassVar[str] = ""  # what no second policy may decide, as it reads after "both decide"

    @property
    def curve(self) -> Quantity | None:
        """A policy has no update of its own: that of CFG, with gaps where there is none."""
        return CFG_UPDATE

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


class Entry(NamedTuple):
    """A rule, and the node of the graph that it comes from, if known, to show there what the rule does."""

    rule: Rule
    node: str | None = None


@dataclass(frozen=True, eq=False)
class GuidancePlan:
    """Rules in graph order. Compared by identity, so that a log can be found by the plan that a model carries."""

    entries: tuple[Entry, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> GuidancePlan:
        """Itself: nothing in it changes, and packs that copy the options of a model deeply copy neither its log nor its weak models."""
        return self

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules alone."""
        return tuple(entry.rule for entry in self.entries)

    def plus(self, rule: Rule, node: str | None = None) -> GuidancePlan:
        """The plan with one rule more."""
        return GuidancePlan((*self.entries, Entry(rule, node)))

    def active(self, kind: type[Rule]) -> list[tuple[int, Any]]:
        """The non-neutral rules of one kind with their position in the plan."""
        return [(index, rule) for index, rule in enumerate(self.rules) if isinstance(rule, kind) and not rule.neutral]


def plan_of(model_options: Mapping[str, Any]) -> GuidancePlan | None:
    """The plan that a model's options carry, if any."""
    return model_options.get("transformer_options", {}).get(PLAN)
