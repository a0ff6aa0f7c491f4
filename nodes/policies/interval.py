"""Guidance Interval node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...guiders.policies.interval import GuidanceInterval
from ..schema import ATTACHED, CATEGORY, check_window, guided, model_input, window_inputs


class LodestarGuidanceInterval(io.ComfyNode):
    """See guiders/policies/interval.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarGuidanceInterval",
            display_name=GuidanceInterval.name,
            category=CATEGORY,
            description="CFG in a part of the schedule only. Outside it the negative prompt is not evaluated: faster and more varied.",
            search_aliases=["cfg interval", "limited interval", "guidance limiter", "cfg start end", "skip cfg"],
            inputs=[model_input(), *window_inputs()],
            outputs=[io.Model.Output(tooltip="The model with the guidance attached.")],
            **ATTACHED,
        )

    @classmethod
    def execute(cls, model: Any, start_percent: float, end_percent: float) -> io.NodeOutput:
        """Attach the rule."""
        check_window(GuidanceInterval.name, start_percent, end_percent)
        return guided(cls, model, GuidanceInterval(start_percent=start_percent, end_percent=end_percent))
