"""Autoguidance node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...guiders.engine.attach import detach
from ...guiders.terms.autoguidance import Autoguidance, check_weak_model, refuse_same_model, with_own_weights
from ..schema import guidance_schema, guided, window_inputs


class LodestarAutoguidance(io.ComfyNode):
    """See guiders/terms/autoguidance.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return guidance_schema(
            Autoguidance,
            node_id="LodestarAutoguidance",
            description="Guides away from a weaker version of the model under the same prompt: better quality without losing variety. "
            "One evaluation of the weak model per step.",
            search_aliases=["autoguidance", "bad model", "weak model"],
            inputs=[
                io.Model.Input(
                    "weak_model",
                    tooltip="A smaller or less trained version of the same model, on the same kind of latent: an early checkpoint, "
                    "the base without its LoRA. A quantised or merely different model does not help.",
                ),
                io.Float.Input(
                    "scale", default=Autoguidance.scale, min=0.0, max=20.0, step=0.05, round=0.001,
                    tooltip="w of the paper: weak + w (model - weak). 1 is off and free; 1.7 to 3 is usual.",
                ),
                *window_inputs(),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, weak_model: Any, scale: float, **window: float) -> io.NodeOutput:
        """Attach the rule; models of different latent formats, and the same model twice, are refused here."""
        check_weak_model(model, weak_model)
        if scale != 1:
            refuse_same_model(detach(model), detach(weak_model))
            weak_model = with_own_weights(weak_model, model)
        return guided(cls, model, Autoguidance(weak_model=weak_model, scale=scale, **window))
