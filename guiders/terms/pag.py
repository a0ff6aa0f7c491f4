"""PAG: Perturbed-Attention Guidance. Ahn et al., ECCV 2024, arXiv 2403.17377, eq. 11 (D + s (D_c - D_p)) and section 4.2 (CFG + PAG)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.branches import Branch
from ..engine.plan import Term
from ..engine.step import Step
from ..network.identity_attention import IdentityAttention
from ..spaces import Layout


def rescaled(guided: Tensor, cond: Tensor, amount: float, layout: Layout) -> Tensor:
    """Pull the standard deviation of each sample toward that of D_c by ``amount`` in [0, 1] (an addition of implementations)."""
    if amount == 0:
        return guided
    parts = []
    for part, reference in zip(layout.split(guided), layout.split(cond), strict=True):
        ratio = reference.std(dim=1, keepdim=True) / part.std(dim=1, keepdim=True).clamp_min(1e-12)
        parts.append(part * torch.lerp(torch.ones_like(ratio), ratio, amount))
    return layout.join(parts, guided)


@dataclass(frozen=True, kw_only=True)
class PAG(Term):
    """D + s (D_c - D_p), where D_p has identity self-attention in a few layers."""

    name: ClassVar[str] = "PAG (Perturbed-Attention Guidance)"
    short: ClassVar[str] = "PAG"
    perturbation: IdentityAttention
    scale: float = 3.0
    rescale: float = 0.0

    @property
    def neutral(self) -> bool:
        """Scale 0 adds nothing."""
        return self.scale == 0

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The positive conditioning with perturbed attention."""
        return (Branch(variant=self.perturbation),)

    def add(self, denoised: Tensor, cond: Tensor, others: Mapping[Branch, Tensor], step: Step) -> Tensor:
        """Ahn et al., eq. 11."""
        guided = denoised + self.scale * (cond - others[self.branches[0]])
        return rescaled(guided, cond, self.rescale, step.layout)
