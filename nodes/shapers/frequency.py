"""Frequency-aware CFG node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...guiders.shapers.frequency import FrequencyGuidance
from ..schema import guidance_schema, guided


class LodestarFrequencyGuidance(io.ComfyNode):
    """See guiders/shapers/frequency.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return guidance_schema(
            FrequencyGuidance,
            node_id="LodestarFrequencyGuidance",
            description="CFG with one weight for what a smaller picture already shows and a larger one for the detail beyond it. "
            "For the second pass of a high-resolution picture. No extra cost.",
            search_aliases=["fa-cfg", "facfg", "frecas", "frequency", "detail", "sharp", "high resolution"],
            inputs=[
                io.Float.Input(
                    "low_scale", default=FrequencyGuidance.low_scale, min=-100.0, max=100.0, step=0.1,
                    tooltip="CFG weight of the low frequencies. Use the sampler's cfg; it replaces that.",
                ),
                io.Float.Input(
                    "high_scale", default=FrequencyGuidance.high_scale, min=-100.0, max=1000.0, step=0.5,
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
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, low_width: int, low_height: int, **scales: float) -> io.NodeOutput:
        """Attach the rule, with the low band's size in latent pixels."""
        ratio = model.get_model_object("latent_format").spacial_downscale_ratio
        width, height = (max(1, round(size / ratio)) for size in (low_width, low_height))
        return guided(cls, model, FrequencyGuidance(low_width=width, low_height=height, **scales))
