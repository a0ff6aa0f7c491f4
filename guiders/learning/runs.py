"""Sampling runs to learn from: the prompts in turn, a seed for each run, through the host's own guider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
from torch import Tensor

from ..engine.checks import refuse_uncond_readers
from ..engine.host import with_all_channels
from ..engine.plan import Policy, Rule, plan_of


@dataclass(frozen=True)
class Runs:
    """What the runs of one fit or search share. ``positive`` holds one CONDITIONING or several, which take turns."""

    name: str
    model: Any
    positive: Sequence[list]
    negative: list
    latent: Mapping[str, Any]
    sampler: Any
    sigmas: Tensor
    cfg: float
    seed: int

    def check(self, least_steps: int, excluded: type[Rule] = Policy) -> None:
        """Raise ValueError for runs that nothing can be learnt from. ``excluded``: the kind of rule that may not be on the model."""
        if len(self.sigmas) - 1 < least_steps:
            raise ValueError(f"{self.name} needs a schedule of at least {least_steps} steps; these sigmas have {len(self.sigmas) - 1}.")
        if self.cfg == 1:
            raise ValueError(f"{self.name} imitates CFG, and cfg 1 is none; use the cfg that you sample with.")
        if self.latent["samples"].is_nested:
            raise ValueError(f"{self.name} takes a latent of one part, not one of picture and sound.")
        refuse_uncond_readers(self.name, self.sampler)
        plan = plan_of(self.model.model_options)
        for _, rule in plan.active(excluded) if plan else ():
            raise ValueError(f"{self.name} needs plain CFG at every step; bypass {rule.name} on its model.")

    def guider(self, number: int, model: Any) -> Any:
        """A guider of a MODEL for run ``number``."""
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.positive[number % len(self.positive)], self.negative)
        guider.set_cfg(self.cfg)
        return guider

    def sample(self, guider: Any, number: int, sampler: Any, most: int | None = None) -> Tensor:
        """Run ``number``, as the sampler nodes do for the seed ``seed + number``, with at most ``most`` rows of the latent."""
        latent = with_all_channels(self.model, self.latent)[:most]
        noise = comfy.sample.prepare_noise(latent, self.seed + number)
        mask = self.latent.get("noise_mask")
        sigmas = self.sigmas.clone()  # the host's uni_pc writes into it
        return guider.sample(noise, latent, sampler, sigmas, denoise_mask=mask, disable_pbar=True, seed=self.seed + number)
