"""Messages as the server sends them, one for every kind of chart: what nodes draw without anything being sampled."""

from __future__ import annotations

import math

STEPS = 20
Message = dict


def _points(values) -> list:
    return [[step, value] for step, value in enumerate(values)]


def _falling(start: float, end: float, count: int = STEPS) -> list:
    return _points(end + (start - end) * math.exp(-4 * step / count) for step in range(count))


def message(node: dict, **about) -> Message:
    """One that is over, about the node "1"."""
    whole = {"prompt": "p", "sampler": "9", "serial": 1, "unit": "step", "step": STEPS, "steps": STEPS, "done": True}
    if "nfe" not in about and node["role"] != "trace":
        whole |= {"nfe": 40, "saved": 0, "evaluations": _points([2] * STEPS)}
    return whole | about | {"nodes": {"1": {"curve": "", **node}}}


def _saving(first: int) -> dict:
    """NFE of a run in which CFG ends after ``first`` steps."""
    return {"nfe": STEPS + first, "saved": STEPS - first, "evaluations": _points([2] * first + [1] * (STEPS - first))}


_COSINE = _points(1 - 0.13 * math.exp(-step / 4) for step in range(11))
_STAGES = {"stage": 1, "stages": [{"width": 64, "height": 64, "steps": 14}, {"width": 128, "height": 128, "steps": 6}]}

# The node's type, the message, and what the chart begins with.
EVERY: dict[str, tuple[str, Message, str]] = {
    "shaper": (
        "LodestarAPG",
        message({"role": "shaper", "kind": "update", "points": _falling(0.5, 0.1), "plain": _falling(1.3, 0.3)}),
        "Shrank CFG's update to 36 %, update 11 %, CFG alone 32 %, step 20 of 20, 40 evaluations (NFE)",
    ),
    "term": (
        "LodestarPAG",
        message({"role": "term", "kind": "update", "points": _falling(0.006, 0.002)}, nfe=60, evaluations=_points([3] * STEPS)),
        "Added up to 0.6 % of the image, update 0.21 %, step 20 of 20, 60 evaluations (NFE)",
    ),
    "error": (
        "LodestarRestoration",
        message({"role": "term", "kind": "error", "points": _falling(0.7, 0.02)}, nfe=20, evaluations=_points([1] * STEPS)),
        "3.5 % away from the damaged picture, error 3.5 %, step 20 of 20, 20 evaluations (NFE)",
    ),
    "no effect": (
        "LodestarAutoguidance",
        message({"role": "term", "kind": "update", "points": _falling(6e-7, 1e-7)}, nfe=60, evaluations=_points([3] * STEPS)),
        "No effect: the update is below 0.001 % of the image",
    ),
    "large": (
        "LodestarFrequencyGuidance",
        message({"role": "shaper", "kind": "update", "points": _falling(1.4, 0.2), "plain": _falling(0.9, 0.2)}),
        "Raised CFG's update to 135 %",
    ),
    "interval": (
        "LodestarGuidanceInterval",
        message(
            {"role": "policy", "kind": "update", "points": _falling(0.8, 0.1)[4:12], "predicted": []},
            nfe=28, saved=12, evaluations=_points([1] * 4 + [2] * 8 + [1] * 8),
        ),
        "CFG in steps 5 to 12 of 20, 12 evaluations saved",
    ),
    "ended": (
        "LodestarAdaptiveGuidance",
        message({"role": "policy", "kind": "cosine", "points": _COSINE, "switch": {"threshold": 0.991, "steps": [11]}}, **_saving(11)),
        "CFG ended at step 11 of 20, 9 evaluations saved, cosine 0.9893, threshold 0.991",
    ),
    "predicted": (
        "LodestarLinearAG",
        message(
            {"role": "policy", "kind": "update", "points": _falling(0.8, 0.1)[:10:2], "predicted": [1, 3, 5, 7, 9]},
            nfe=25, saved=15, evaluations=_points([2, 1] * 5 + [1] * 10),
        ),
        "CFG in 5 of 20 steps, 5 more predicted, 15 evaluations saved",
    ),
    "cfgpp": (
        "LodestarCFGPP",
        message({"role": "trace", "kind": "weight", "points": _falling(9.2, 0.6)}),
        "As strong as cfg 2.93 on average, cfg 0.792",
    ),
    "inversion": (
        "LodestarCFGPPInvert",
        message({"role": "trace", "kind": "noise", "points": _points(0.99 - 0.02 * (step % 3) for step in range(8))}, step=8, done=False),
        "Found noise of 97 % strength, noise 97 %, step 8 of 20",
    ),
    "cascade": (
        "LodestarFreCaS",
        message({"role": "cascade", "kind": "update", "points": _falling(0.7, 0.1)}, **_STAGES),
        "20 steps, the work of 9.5 at 128×128, CFG update 11 %, stage 2 of 2, step 20 of 20",
    ),
    "fit": (
        "LodestarLinearAGFit",
        message({"role": "trace", "kind": "residual", "points": _falling(0.02, 0.004, 50)[:30]}, unit="run", step=30, steps=50, done=False),
        "Misses 0.56 % of the unconditional prediction, error 0.56 %, run 30 of 50",
    ),
    "search": (
        "LodestarPolicySearch",
        message(
            {"role": "trace", "kind": "loss", "points": _falling(0.4, 0.03, 100)}, unit="iteration", step=100, steps=100, nfe=27, saved=13
        ),
        "Policy found: 27 of 40 evaluations, loss 0.0371, iteration 100 of 100",
    ),
}  # fmt: skip
