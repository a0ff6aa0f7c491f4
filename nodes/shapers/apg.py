"""Adaptive Projected Guidance node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...guiders.shapers.apg import APG
from ..schema import ATTACHED, CATEGORY, check_window, guided, model_input, window_inputs


class LodestarAPG(io.ComfyNode):
    """See guiders/shapers/apg.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarAPG",
            display_name=APG.name,
            category=CATEGORY,
            description="Removes the part of the CFG update that only adds saturation, so that high cfg stays natural. No extra cost.",
            search_aliases=["apg", "projected guidance", "oversaturation", "cfg rescale", "burned"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "eta", default=0.0, min=-10.0, max=10.0, step=0.01,
                    tooltip="Weight of the part of the update parallel to the image. 0 as in the paper; 1 keeps it; more saturates more.",
                ),
                io.Float.Input(
                    "norm_threshold", default=15.0, min=0.0, max=1000.0, step=0.1,
                    tooltip="Largest norm of the update, per image; 0 turns it off. Paper: 15 for SDXL, 7.5 for SD2.1, "
                    "2.5 to 5 for small latents.",
                ),
                io.Float.Input(
                    "momentum", default=-0.5, min=-0.99, max=0.99, step=0.01,
                    tooltip="Share of the earlier updates that is added; negative values (-0.75 to -0.25) take it away. 0 turns it off.",
                ),
                *window_inputs(),
            ],
            outputs=[io.Model.Output(tooltip="The model with the guidance attached.")],
            **ATTACHED,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, eta: float, norm_threshold: float, momentum: float, start_percent: float, end_percent: float
    ) -> io.NodeOutput:
        """Attach the rule."""
        check_window(APG.name, start_percent, end_percent)
        rule = APG(eta=eta, norm_threshold=norm_threshold, momentum=momentum, start_percent=start_percent, end_percent=end_percent)
        return guided(cls, model, rule)
