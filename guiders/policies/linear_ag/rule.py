"""LinearAG: the unconditional prediction as a linear regression on earlier ones. Castillo et al., AAAI 2025, arXiv 2312.12487.

The equation and its solution are in regression.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...engine.checks import refuse_dual_cfg, refuse_uncond_readers
from ...engine.choice import Choice
from ...engine.plan import Policy
from ...engine.start import Start
from ...engine.step import Step
from ...learning.recognition import setting_of
from .coefficients import Coefficients
from .regression import denoised, predict, score

SECOND_HALVES = ("conditional", "cfg")


@dataclass(frozen=True, kw_only=True)
class LinearAG(Policy):
    """First half: D_u is evaluated at every second step and predicted at the others. Second half: D_c alone, or left to other policies."""

    name: ClassVar[str] = "LinearAG: apply"
    short: ClassVar[str] = "LinearAG"
    claims: ClassVar[str] = "what every step evaluates"
    coefficients: Coefficients
    second_half: str = "conditional"

    @property
    def neutral(self) -> bool:
        """Nothing is replaced and nothing left out."""
        return not self.coefficients.betas and self.second_half == "cfg"

    def check(self, start: Start) -> None:
        """The run must be what the coefficients were fitted for."""
        refuse_dual_cfg(self.name, start.guider)
        refuse_uncond_readers(self.name, start.sampler)
        self.coefficients.setting.refuse_other(self.name, "these coefficients were", setting_of(start.guider, start.sampler, start.sigmas))

    def choose(self, step: Step) -> Choice:
        """A step is predicted if both scores of every earlier step are known. An interval or a switch may have left some of them out."""
        steps = self.coefficients.setting.steps
        if self.second_half == "conditional" and step.index >= steps // 2:
            return Choice(weight=1.0)
        return Choice(predicted=step.index in self.coefficients.betas and len(step.memory.get("uncond", ())) == step.index)

    def observe(self, cond: Tensor | None, uncond: Tensor | None, x: Tensor, sigma: Tensor, step: Step) -> None:
        """Keep c_k, u_k for later steps."""
        if cond is not None and uncond is not None:
            self.remember(score(x, cond, sigma), score(x, uncond, sigma), step)

    def predict(self, cond: Tensor, x: Tensor, sigma: Tensor, step: Step) -> Tensor:
        """D_u from u_hat_k. Later steps use u_hat_k as u_k."""
        c = score(x, cond, sigma)
        u = predict(self.coefficients.betas[step.index], [*step.memory["cond"], c], step.memory["uncond"])
        self.remember(c, u, step)
        return denoised(x, u, sigma)

    def remember(self, c: Tensor, u: Tensor, step: Step) -> None:
        """Keep c_k and u_k if a later step needs them."""
        if step.index < max(self.coefficients.betas, default=0) and len(step.memory.setdefault("uncond", [])) == step.index:
            step.memory.setdefault("cond", []).append(c)
            step.memory["uncond"].append(u)
