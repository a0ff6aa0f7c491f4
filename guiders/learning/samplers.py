"""The host's samplers that gradients can go through."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

# deterministic, one function of the schedule, every operation differentiable (tests/policies/test_search.py tries each of them)
SAMPLERS = ("euler", "heun", "heunpp2", "dpm_2", "lms", "dpmpp_2m", "ipndm", "ipndm_v", "gradient_estimation")


def differentiable(sampler: Any, name: str) -> Callable[..., Tensor]:
    """The sampler's function without its ``torch.no_grad``, with its options.

    Raises ValueError, which begins with ``name``, for other samplers than SAMPLERS.
    """
    function = getattr(sampler, "sampler_function", None)
    called = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
    options = getattr(sampler, "extra_options", None) or {}
    if called not in SAMPLERS or options.get("s_churn"):
        reason = "adds noise" if options.get("s_churn") else "cannot be differentiated"
        raise ValueError(f"{name}: the sampler {called} {reason}; use one of {', '.join(SAMPLERS)}, or ddim.")
    return partial(getattr(function, "__wrapped__", function), **options)
