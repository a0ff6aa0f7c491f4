"""The guidance nodes with settings that matter on tiny random models, by short names: ``guided(model, kind, "apg+pag")``."""

from __future__ import annotations

import functools
from typing import Any

from _tiny import call, cond, latent, tiny

# Cosines at which the images of a batch of two switch at different steps.
THRESHOLDS = {"unet": 0.92, "unet_v": 0.65, "mmdit": 0.875, "flux": 0.95}
NODES: dict[str, tuple[str, dict[str, Any]]] = {
    "apg": ("LodestarAPG", {"norm_threshold": 5.0}),
    "apg_window": ("LodestarAPG", {"eta": 0.3, "norm_threshold": 3.0, "momentum": -0.75, "start_percent": 0.2, "end_percent": 0.7}),
    "apg_momentum": ("LodestarAPG", {"eta": 1.0, "norm_threshold": 0.0, "momentum": 0.4}),
    "apg_neutral": ("LodestarAPG", {"eta": 1.0, "norm_threshold": 0.0, "momentum": 0.0}),
    "fa": ("LodestarFrequencyGuidance", {"low_scale": 3.0, "high_scale": 7.0, "low_width": 32, "low_height": 48}),
    "pag": ("LodestarPAG", {"scale": 2.0, "layers": "auto"}),
    "pag_window": ("LodestarPAG", {"scale": 1.5, "layers": "auto", "rescale": 0.5, "start_percent": 0.2, "end_percent": 0.6}),
    "pag_pass": ("LodestarPAG", {"scale": 1.5, "layers": "auto", "joint_attention": "passthrough"}),
    "pag_neutral": ("LodestarPAG", {"scale": 0.0, "layers": "auto"}),
    "auto": ("LodestarAutoguidance", {"scale": 1.5}),
    "auto_window": ("LodestarAutoguidance", {"scale": 1.8, "start_percent": 0.3, "end_percent": 0.8}),
    "auto_neutral": ("LodestarAutoguidance", {"scale": 1.0}),
    "interval": ("LodestarGuidanceInterval", {"start_percent": 0.15, "end_percent": 0.6}),
    "interval_early": ("LodestarGuidanceInterval", {"start_percent": 0.0, "end_percent": 0.4}),
    "ag": ("LodestarAdaptiveGuidance", {}),
    "ag_same": ("LodestarAdaptiveGuidance", {"switch": "same_step"}),
    "ag_terms": ("LodestarAdaptiveGuidance", {"stop_terms": True}),
    "ag_noise": ("LodestarAdaptiveGuidance", {"space": "noise"}),
    "ag_velocity": ("LodestarAdaptiveGuidance", {"space": "velocity"}),
    "linear": ("LodestarLinearAG", {}),
    "linear_cfg": ("LodestarLinearAG", {"second_half": "cfg"}),
    "policy": ("LodestarGuidancePolicy", {}),
}
LAYERS = {"unet": "output:0", "unet_v": "input:3, middle:0", "mmdit": "double:0-1", "flux": "single:1"}
SINGLE = tuple(NODES)
COMBINED = (
    "apg+pag", "pag+apg", "apg+auto", "pag+auto", "auto+pag", "apg+pag+auto", "apg+interval", "pag+interval_early", "apg+ag",
    "pag+ag", "pag+ag_terms", "auto+ag_terms", "apg_window+pag_window+auto_window", "interval+ag", "fa+pag", "fa+apg", "pag+pag_window",
    "auto+auto_window", "apg+pag+auto+interval+ag", "linear+apg", "linear+pag+auto", "linear_cfg+ag", "policy+pag", "policy+apg+interval",
    "apg_neutral+pag_neutral+auto_neutral", "apg+pag_layers+ag_same",
)  # fmt: skip


def guided(model: Any, kind: str, names: str, sampler: str = "euler", steps: int = 6) -> Any:
    """The model with the nodes of a "+" list attached in this order; "" attaches none."""
    for name in filter(None, names.split("+")):
        model = _attached(model, kind, name, sampler, steps)
    return model


def _attached(model: Any, kind: str, name: str, sampler: str, steps: int) -> Any:
    node, inputs = NODES["pag" if name == "pag_layers" else name]
    inputs = dict(inputs)
    if name == "pag_layers":
        inputs["layers"] = LAYERS[kind]
    if node == "LodestarAutoguidance":
        inputs["weak_model"] = tiny(kind, 7)
    elif node == "LodestarAdaptiveGuidance":
        inputs["threshold"] = THRESHOLDS[kind]
    elif node == "LodestarLinearAG":
        inputs["coefficients"] = fitted(kind, sampler, steps)[0]
    elif node == "LodestarGuidancePolicy":
        inputs["policy"] = searched(kind, sampler, steps)[0]
    return call(node, model=model, **inputs)[0]


def _learning(kind: str, sampler: str, steps: int) -> dict[str, list]:
    model = tiny(kind)
    return {
        "model": [model], "positive": [cond(1), cond(3)], "negative": [cond(2)], "latent_image": [latent(model, 2)],
        "sampler": list(call("KSamplerSelect", sampler_name=sampler)), "cfg": [4.0], "seed": [5],
        "sigmas": list(call("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)),
    }  # fmt: skip


@functools.cache
def fitted(kind: str, sampler: str, steps: int) -> tuple:
    """LinearAG's coefficients and report."""
    return call("LodestarLinearAGFit", trajectories=[8], **_learning(kind, sampler, steps))


@functools.cache
def searched(kind: str, sampler: str, steps: int) -> tuple:
    """A policy, its JSON and the report."""
    return call("LodestarPolicySearch", iterations=[2], cost_weight=[0.5], **_learning(kind, sampler, steps))
