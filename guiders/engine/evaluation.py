"""Evaluation: what belongs to one evaluation of the guided model. FusedCall: one call of the host with extra branches in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import and_

from torch import Tensor

from .branches import Branch
from .choice import Choice, Rows
from .step import Point


@dataclass(frozen=True)
class FusedCall:
    """A call of the host's ``calc_cond_batch`` with the branches' lists of conds in front of the host's own.

    The host numbers the lists, and each chunk of a batch bears the number of its list (``cond_or_uncond``).

    branches: whose lists stand in front. positive: the number of the positive list as it would be without them.
    rows: the rows that are needed of each list; of a list that is not named here, all.
    """

    branches: tuple[Branch, ...] = ()
    positive: int = 0
    rows: tuple[Rows, ...] = ()

    def rows_of(self, label: int) -> Rows:
        """The rows that are needed of the list with this number."""
        return self.rows[label] if label < len(self.rows) else True

    def branch_of(self, label: int) -> Branch | None:
        """The branch whose list has this number; None for the host's own lists."""
        return self.branches[label] if label < len(self.branches) else None

    def host_labels(self, labels: Sequence[int]) -> list[int]:
        """``cond_or_uncond`` as it would be without us: a branch counts as cond."""
        extra = len(self.branches)
        return [self.positive if label < extra else label - extra for label in labels]


@dataclass(eq=False)
class Evaluation:
    """From the sampler's question to the denoised answer. The next evaluation replaces it as a whole.

    index: the solver step that asks. first: whether this is the first evaluation of that step.
    choices: what each policy has chosen, by its index in the plan. branches: predictions that terms need besides the sampler's own.
    at_weight_1: whether a policy has set the sampler's cfg to 1, where the host itself drops D_u.
    served: whether the sampler's own conds have been evaluated; further calls of the host pass through.
    guides: whether the sampler has asked for D_u. awaits_uncond: whether its evaluation is still to come, in a call of its own.
    uncond_first: whether it came in such a call before that for D_c.
    call: what the host is evaluating now.
    cond, others: D_c and the branches' D_k, once they are there. point: what they are predictions of.
    shaped: what the shapers made of D_c and D_u.
    """

    index: int = -1
    first: bool = True
    choices: dict[int, Choice] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()
    at_weight_1: bool = False
    served: bool = False
    guides: bool = False
    awaits_uncond: bool = False
    uncond_first: bool = False
    call: FusedCall = FusedCall()
    cond: Tensor | None = None
    others: dict[Branch, Tensor] = field(default_factory=dict)
    point: Point | None = None
    shaped: Tensor | None = None

    @property
    def choice(self) -> Choice:
        """What is left of all policies' choices."""
        return reduce(and_, self.choices.values(), Choice())

    @contextmanager
    def calling(self, call: FusedCall) -> Iterator[None]:
        """While the host evaluates this call."""
        self.call = call
        try:
            yield
        finally:
            self.call = FusedCall()
