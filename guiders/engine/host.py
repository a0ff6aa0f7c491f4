"""Facts about the host: its samplers, guiders and slots, in one spelling."""

from __future__ import annotations

from functools import partial
from typing import Any

CFG_SLOT = "sampler_cfg_function"  # in model_options: the one function that replaces the host's combination
POST_CFG = "sampler_post_cfg_function"


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


def refuse_foreign_cfg(name: str, options: dict[str, Any]) -> None:
    """Raise ValueError where another pack has claimed the CFG slot of these model options, which rule ``name`` needs."""
    function = options.get(CFG_SLOT)
    if function is not None:
        owner = getattr(function, "__qualname__", type(function).__name__).split(".")[0]
        raise ValueError(f"{name} and {owner} both replace the CFG combination; bypass one of the two nodes.")
