"""Perturbed-Attention Guidance node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...guiders.network.identity_attention import IdentityAttention
from ...guiders.network.layers import resolve_layers
from ...guiders.terms.pag import PAG
from ..schema import guidance_schema, guided, window_inputs


class LodestarPAG(io.ComfyNode):
    """See guiders/terms/pag.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return guidance_schema(
            PAG,
            node_id="LodestarPAG",
            description="Guides away from a prediction with broken self-attention: better structure, with or without a prompt. "
            "One more branch per step, in the same model call.",
            search_aliases=["pag", "perturbed attention", "structure"],
            inputs=[
                io.Float.Input(
                    "scale", default=PAG.scale, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="Strength s of the update s (D_c - D_p). 0 is off and free. 1.5 to 5 with CFG, about 5 without.",
                ),
                io.String.Input(
                    "layers", default="middle",
                    tooltip="Layers to perturb. UNet: middle, middle:0, input:7, output:3.1, or m0, d2.2-9, u0.4. "
                    "Transformers: auto, double:7, single:12, double:4-9. Separate several by commas.",
                ),
                io.Combo.Input(
                    "joint_attention", options=["masked", "passthrough"], default="masked", advanced=True,
                    tooltip="For transformers that attend to text and image together. masked: an image token sees itself and the text. "
                    "passthrough: every token sees itself alone.",
                ),
                io.Float.Input(
                    "rescale", default=PAG.rescale, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Pulls the contrast back to that of the unguided prediction; not in the paper. 0 is off.",
                ),
                *window_inputs(),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, layers: str, joint_attention: str, **settings: float) -> io.NodeOutput:
        """Attach the rule; a wrong layer name is refused here, with the layers this model has."""
        try:
            perturbation = IdentityAttention(resolve_layers(model, layers), joint_attention)
        except ValueError as error:
            raise ValueError(f"{PAG.name}: {error}") from None
        return guided(cls, model, PAG(perturbation=perturbation, **settings))
