"""Frequency-aware CFG node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...guiders.shapers.frequency import FrequencyGuidance
from ..schema import ATTACHED, CATEGORY, guided, model_input


class LodestarFrequencyGuidance(io.ComfyNode):
    """See guiders/shapers/frequency.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarFrequencyGuidance",
            display_name=FrequencyGuidance.name,
            category=CATEGORY,
            description="CFG with one weight for what a smaller picture already shows and a larger one for the detail beyond it. "
            "For the second pass of a high-resolution picture. No extra cost.",
            search_aliases=["fa-cfg", "facfg", "frecas", "frequency", "detail", "sharp", "high resolution"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "low_scale", default=7.5, min=-100.0, max=100.0, step=0.1,
                    tooltip="CFG weight of the low frequencies. Use the sampler's cfg; it replaces that.",
                ),
                io.Float.Input(
                    "high_scale", default=35.0, min=-100.0, max=1000.0, step=0.5,
                    tooltip="CFG weight of the frequencies above the low band. Paper: 35 to 45. Equal to low_scale is plain CFG.",
                ),
                io.Int.Input(
                    "low_width", default=1024, min=8, max=16384, step=8,
                    tooltip="Width of the low band in picture pixels: that of the previous, smaller stage.",
                ),
                io.Int.Input(
                    "low_height", default=1024, min=8, max=16384, step=8,
                    tooltip="Height of the low band in picture pixels: that of the previous, smaller stage.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the guidance attached.")],
            **ATTACHED,
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, low_scale: float, high_scale: float, low_width: int, low_height: int) -> io.NodeOutput:
        """Attach the rule, with the low band's size in latent pixels."""
        ratio = model.get_model_object("latent_format").spacial_downscale_ratio
        height, width = (max(1, round(size / ratio)) for size in (low_height, low_width))
        rule = FrequencyGuidance(low_scale=low_scale, high_scale=high_scale, low_height=height, low_width=width)
        return guided(cls, model, rule)
