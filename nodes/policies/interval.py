"""Guidance Interval node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...guiders.policies.interval import GuidanceInterval
from ..schema import guidance_schema, guided, window_inputs


class LodestarGuidanceInterval(io.ComfyNode):
    """See guiders/policies/interval.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return guidance_schema(
            GuidanceInterval,
            node_id="LodestarGuidanceInterval",
            description="CFG in a part of the schedule only. Outside it the negative prompt is not evaluated: faster and more varied.",
            search_aliases=["cfg interval", "limited interval", "cfg start end", "skip cfg"],
            inputs=window_inputs(start=0.2, end=0.8),  # a fresh node shows what it does; 0 to 1 would be plain CFG
        )

    @classmethod
    def execute(cls, model: Any, **window: float) -> io.NodeOutput:
        """Attach the rule."""
        return guided(cls, model, GuidanceInterval(**window))
