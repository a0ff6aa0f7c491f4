"""Adaptive Guidance node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...guiders.policies.adaptive import SPACES, SWITCHES, AdaptiveGuidance
from ..schema import guidance_schema, guided


class LodestarAdaptiveGuidance(io.ComfyNode):
    """See guiders/policies/adaptive.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return guidance_schema(
            AdaptiveGuidance,
            node_id="LodestarAdaptiveGuidance",
            description="CFG until the predictions with and without the prompt agree, then the prompt alone: "
            "about a quarter fewer evaluations for nearly the same image.",
            search_aliases=["ag", "adaptive cfg", "skip uncond", "fewer evaluations", "speed up", "faster cfg"],
            inputs=[
                io.Float.Input(
                    "threshold", default=AdaptiveGuidance.threshold, min=-1.0, max=1.001, step=0.0001, round=0.000001,
                    tooltip="CFG ends for an image when the cosine of its conditional and unconditional predictions reaches this value. "
                    "Higher is later: closer to CFG, less saved. Above 1 is off. It depends on the model and the space: see the help page.",
                ),
                io.Combo.Input(
                    "space", options=list(SPACES), default=AdaptiveGuidance.space,
                    tooltip="What is compared: denoised images (recommended), noise predictions (the paper; close to 1 from the start), "
                    "or velocities. A threshold for one space does not suit another.",
                ),
                io.Combo.Input(
                    "switch", options=list(SWITCHES), default=AdaptiveGuidance.switch, advanced=True,
                    tooltip="When CFG ends: from the step after the threshold is reached, or already in that step, "
                    "whose unconditional prediction is then paid for and not used.",
                ),
                io.Boolean.Input(
                    "stop_terms", default=AdaptiveGuidance.stop_terms, advanced=True,
                    tooltip="Also end the other guidance of this pack (PAG, autoguidance) for an image that has switched: "
                    "then it costs one evaluation per step.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        """Attach the rule; the inputs are its fields."""
        return guided(cls, model, AdaptiveGuidance(**settings))
