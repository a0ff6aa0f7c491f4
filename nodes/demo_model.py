"""Demo Model node."""

from __future__ import annotations

from comfy_api.latest import io

from ..guiders.engine.attach import attach

MODELS, STRENGTHS = ("unet", "mmdit"), ("main", "weak")


class LodestarDemoModel(io.ComfyNode):
    """See demo/README.md."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarDemoModel",
            display_name="Demo Model (Shapes)",
            category="lodestar/demo",
            description="A tiny diffusion model that draws coloured shapes, such as 'a small red triangle on a grey background'. "
            "32x32 pixels, in pixel space; samples in seconds on any machine.",
            search_aliases=["demo", "shapes", "tiny model", "test model"],
            inputs=[
                io.Combo.Input("model", options=list(MODELS), default="unet", tooltip="unet predicts noise, mmdit is a flow transformer."),
                io.Combo.Input(
                    "strength", options=list(STRENGTHS), default="main", tooltip="weak is smaller and less trained: for Autoguidance."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model."),
                io.Clip.Output(tooltip="The caption encoder, for CLIP Text Encode."),
                io.Vae.Output(tooltip="Pixel space: pictures are their own latents."),
            ],
        )

    @classmethod
    def execute(cls, model: str, strength: str) -> io.NodeOutput:
        """Load the embedded weights. The empty plan lets Guidance Report count plain CFG as well."""
        from ..demo import models  # here: it is built on the host's networks, which other nodes can do without

        return io.NodeOutput(attach(models.load_model(model, strength)), models.load_clip(), models.load_vae())
