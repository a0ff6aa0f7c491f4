"""Adaptive Guidance. Castillo et al., AAAI 2025, arXiv 2312.12487 (criterion and latch from summaries of the paper; no official code)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..engine.checks import refuse_uncond_readers
from ..engine.choice import Choice, Rows
from ..engine.curves import COSINE, Quantity
from ..engine.log import RunLog, Switch
from ..engine.plan import Policy
from ..engine.start import Start
from ..engine.step import Step
from ..spaces import Layout, cosine_per_sample, on_device_of, to_noise, to_velocity

Space = Literal["denoised", "noise", "velocity"]
SPACES: tuple[Space, ...] = ("denoised", "noise", "velocity")
SWITCHES = ("next_step", "same_step")


def gamma(cond: Tensor, uncond: Tensor, layout: Layout) -> Tensor:
    """gamma = <p_c, p_u> / (||p_c|| ||p_u||) per sample: [B, ...], [B, ...] -> [B] float64."""
    return cosine_per_sample(cond, uncond, layout)


def in_space(space: Space, denoised: Tensor, x: Tensor, sigma: Tensor, flow: bool) -> Tensor:
    """A denoised prediction [B, ...] at x [B, ...], sigma [B] as the prediction that a space compares."""
    if space == "denoised":
        return denoised
    return (to_noise if space == "noise" else to_velocity)(denoised, x, sigma, flow)


@dataclass(frozen=True, kw_only=True)
class AdaptiveGuidance(Policy):
    """CFG until gamma >= threshold, D_c from the next step on (or in the same one); per sample, and for the rest of the run."""

    name: ClassVar[str] = "AG (Adaptive Guidance)"
    short: ClassVar[str] = "AG"
    claims: ClassVar[str] = "when CFG ends"
    threshold: float = 0.998
    space: Space = "denoised"
    switch: Literal["next_step", "same_step"] = "next_step"
    stop_terms: bool = False

    @property
    def neutral(self) -> bool:
        """A cosine never exceeds 1."""
        return self.threshold > 1

    @property
    def curve(self) -> Quantity:
        """That of gamma."""
        return COSINE if self.space == "denoised" else Quantity(f"{COSINE.name} ({self.space})", "cosine")

    def check(self, start: Start) -> None:
        """Refuse samplers that go on to use D_u when it is no longer evaluated."""
        refuse_uncond_readers(self.name, start.sampler)

    def choose(self, step: Step) -> Choice:
        """D_u for the samples that have not switched, the same in all stages of a step. Here is the step's one wait for the GPU."""
        memory = step.memory
        if step.first and "met" in memory:
            _latch(memory, step.index)
        return self._choice(_rows_left(memory))

    def observe(self, cond: Tensor | None, uncond: Tensor | None, x: Tensor, sigma: Tensor, step: Step) -> Choice | None:
        """Measure gamma at the first stage of a step, and latch."""
        if cond is None or uncond is None or not step.first:
            return None
        values = gamma(*(in_space(self.space, denoised, x, sigma, step.flow) for denoised in (cond, uncond)), step.layout)
        left = _rows_left(step.memory)
        step.record(self.curve, values if left is True else values[on_device_of(values, [i for i, is_open in enumerate(left) if is_open])])
        step.memory["met"] = values >= self.threshold
        if self.switch == "next_step":
            return None
        _latch(step.memory, step.index)
        return self._choice(_rows_left(step.memory))

    def _choice(self, left: Rows) -> Choice:
        return Choice(uncond=left, terms=left if self.stop_terms else True)

    def note(self, memory: dict[str, Any], log: RunLog) -> None:
        """The switch of each image."""
        log.switches[self.name] = Switch(self.curve, self.threshold, tuple(memory.get("since", ())))


def _latch(memory: dict[str, Any], index: int) -> None:
    """Read which samples have met the threshold; those that are new go without CFG from step ``index`` on."""
    met = memory.pop("met").tolist()
    since = memory.get("since", [None] * len(met))
    memory["since"] = [index if now and before is None else before for before, now in zip(since, met, strict=True)]


def _rows_left(memory: dict[str, Any]) -> Rows:
    """The samples that still have CFG."""
    left = tuple(step is None for step in memory.get("since", ()))
    return all(left) or (left if any(left) else False)
