"""Adaptive Projected Guidance node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...guiders.shapers.apg import APG
from ..schema import guidance_schema, guided, window_inputs


class LodestarAPG(io.ComfyNode):
    """See guiders/shapers/apg.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return guidance_schema(
            APG,
            node_id="LodestarAPG",
            description="Removes the part of the CFG update that only adds saturation, so that high cfg stays natural. No extra cost.",
            search_aliases=["apg", "projected guidance", "oversaturation", "burned"],
            inputs=[
                io.Float.Input(
                    "eta", default=APG.eta, min=-10.0, max=10.0, step=0.01,
                    tooltip="Weight of the part of the update parallel to the image. 0 as in the paper; 1 keeps it; more saturates more.",
                ),
                io.Float.Input(
                    "norm_threshold", default=APG.norm_threshold, min=0.0, max=1000.0, step=0.1,
                    tooltip="Largest norm of the update, per image; 0 turns it off. Paper: 15 for SDXL, 7.5 for SD2.1, "
                    "2.5 to 5 for small latents.",
                ),
                io.Float.Input(
                    "momentum", default=APG.momentum, min=-0.99, max=0.99, step=0.01,
                    tooltip="Share of the earlier updates that is added; negative values (-0.75 to -0.25) take it away. 0 turns it off.",
                ),
                *window_inputs(),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, **settings: float) -> io.NodeOutput:
        """Attach the rule; the inputs are its fields."""
        return guided(cls, model, APG(**settings))
