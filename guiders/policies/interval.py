"""Guidance interval. Kynkaanniemi et al., NeurIPS 2024, arXiv 2404.07724, eq. 5: w(sigma) = w inside (sigma_end, sigma_start], else 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..engine.choice import Choice
from ..engine.plan import Policy
from ..engine.step import Step


@dataclass(frozen=True, kw_only=True)
class GuidanceInterval(Policy):
    """CFG inside a share of the schedule; outside it the conditional prediction alone, which costs no unconditional evaluation."""

    name: ClassVar[str] = "Guidance Interval"
    short: ClassVar[str] = "Guidance Interval"

    @property
    def neutral(self) -> bool:
        """The whole schedule is plain CFG."""
        return self.start_percent <= 0 and self.end_percent >= 1

    def choose(self, step: Step) -> Choice:
        """w = 1 outside. The host then drops D_u, unless another pack has asked it not to.

        Samplers that use D_u themselves (CFG++) have asked too; there D_c takes its place, which makes the step the conditional model's.
        """
        return Choice() if step.covered else Choice(weight=1.0, uncond=not step.reads_uncond)
