"""What a rule has to know about the host's samplers."""

from __future__ import annotations

from functools import partial
from typing import Any


def reads_uncond(sampler: Any) -> str | None:
    """The name of a sampler whose steps use the unconditional prediction itself (CFG++); None for all others.

    The host's and other packs' have ``cfg_pp`` in their names. One of this pack, or its function, has its name in ``reads_uncond``.
    """
    function = getattr(sampler, "sampler_function", sampler)
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    known = name.removeprefix("sample_") if "cfg_pp" in name or "cfgpp" in name.lower() else None
    return getattr(function, "reads_uncond", known)
