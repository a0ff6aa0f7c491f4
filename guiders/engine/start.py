"""Start: a sampling call that is about to begin, for rules that check whether they can work in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Start:
    """guider and sampler are the host's, sigmas [T + 1] is the schedule. shape: of the latent [B, C, ...], None where not known yet."""

    guider: Any
    sampler: Any
    sigmas: Tensor
    shape: Sequence[int] | None
