"""Restoration nodes: a picture that is damaged for trying, one that is damaged already, and guidance by what is left of it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..guiders.restoration.codec import check_vae
from ..guiders.restoration.damage import OPERATORS, operator_of
from ..guiders.restoration.measurement import Measurement
from ..guiders.restoration.operators import METHODS
from ..guiders.restoration.rule import MODES, Restoration
from .schema import guidance_schema, guided, window_inputs

CATEGORY = "lodestar/restoration"
DEGRADE, MEASUREMENT = "Degrade (Measurement)", "Measurement"
MeasurementType = io.Custom("GUIDANCE_MEASUREMENT")


def _operator_inputs() -> list[io.Input]:
    """What describes the damage; each operator reads its own."""
    return [
        io.Combo.Input(
            "operator", options=list(OPERATORS), default="downscale",
            tooltip="inpaint: a part is hidden. downscale: fewer pixels. blur: out of focus. motion blur: moved. JPEG: compressed. "
            "grey: without colours.",
        ),
        io.Int.Input("factor", default=4, min=2, max=32, tooltip="downscale: how many times fewer pixels along each side."),
        io.Combo.Input(
            "method", options=list(METHODS), default="bicubic",
            tooltip="downscale: bicubic, as most programs make pictures smaller, or area, the mean of squares.",
        ),
        io.Int.Input(
            "kernel_size", default=61, min=3, max=255, step=2,
            tooltip="blur and motion blur: side of the kernel in pixels, an odd number. A movement is as long as that.",
        ),
        io.Float.Input(
            "blur_width", default=3.0, min=0.1, max=50.0, step=0.1, tooltip="blur: standard deviation of the kernel, in pixels."
        ),
        io.Float.Input(
            "angle", default=45.0, min=0.0, max=180.0, step=1.0,
            tooltip="motion blur: direction in degrees, 0 along the horizontal, 90 upwards.",
        ),
        io.Int.Input("quality", default=20, min=1, max=100, tooltip="JPEG: the quality that it was saved with."),
    ]  # fmt: skip


def _optional_inputs() -> list[io.Input]:
    return [
        io.Mask.Input("mask", optional=True, tooltip="inpaint: white is what is hidden, to be made up. Of the picture's size."),
        io.Image.Input(
            "kernel", optional=True,
            tooltip="motion blur: the path of the movement, white on black, in place of a line at the angle. Square, of an odd size.",
        ),
    ]  # fmt: skip


def _noise_input() -> io.Input:
    return io.Float.Input(
        "noise", default=0.0, min=0.0, max=1.0, step=0.005, round=0.0001,
        tooltip="Standard deviation of the measurement's noise, where black is -1 and white is 1. The papers try 0 to 0.05.",
    )  # fmt: skip


class LodestarMeasure(io.ComfyNode):
    """See guiders/restoration/operators.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarMeasure",
            display_name=DEGRADE,
            category=CATEGORY,
            description="Damages a picture in a known way, to try restoration on something whose original you have.",
            search_aliases=["degrade", "measurement", "inverse problem", "damage", "blur", "downscale"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to damage."),
                *_operator_inputs(),
                _noise_input(),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Seed of the measurement's noise.",
                ),
                *_optional_inputs(),
            ],
            outputs=[
                MeasurementType.Output("measurement", tooltip="What is left of the picture, for Restoration."),
                io.Image.Output("image", tooltip="What it looks like."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image: Tensor, noise: float, seed: int, **settings: Any) -> io.NodeOutput:
        """Damage the picture."""
        measurement = _named(DEGRADE, lambda: Measurement.of_original(image, operator_of(**settings), noise, seed))
        return io.NodeOutput(measurement, measurement.picture())


class LodestarMeasurement(io.ComfyNode):
    """See guiders/restoration/measurement.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarMeasurement",
            display_name=MEASUREMENT,
            category=CATEGORY,
            description="Says how a picture that you have was damaged, so that Restoration can look for what it was before.",
            search_aliases=["measurement", "inverse problem", "super resolution", "deblur", "colorize", "restore"],
            inputs=[
                io.Image.Input("image", tooltip="The damaged picture. For downscale the small one, not one enlarged again."),
                *_operator_inputs(),
                _noise_input(),
                *_optional_inputs(),
            ],
            outputs=[MeasurementType.Output("measurement", tooltip="What is left of the picture, for Restoration.")],
        )

    @classmethod
    def execute(cls, image: Tensor, noise: float, **settings: Any) -> io.NodeOutput:
        """Read the picture."""
        return io.NodeOutput(_named(MEASUREMENT, lambda: Measurement.of_damaged(image, operator_of(**settings), noise)))


def _named(name: str, make: Any) -> Measurement:
    """The measurement; errors begin with the node's name."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class LodestarRestoration(io.ComfyNode):
    """See guiders/restoration/rule.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return guidance_schema(
            Restoration,
            node_id="LodestarRestoration",
            description="Guides by a damaged picture: what it still shows is kept, and the model makes up the rest. Super-resolution, "
            "deblurring, inpainting, JPEG, colours, with any model. Put it last, next to the sampler.",
            search_aliases=["restoration", "super resolution", "deblur", "inpaint", "psld", "dps", "inverse problem"],
            inputs=[
                io.Vae.Input("vae", optional=True, tooltip="The VAE of the model. Models that work on pictures themselves need none."),
                MeasurementType.Input("measurement", tooltip="From Measurement or Degrade (Measurement)."),
                io.Combo.Input(
                    "mode", options=list(MODES), default=Restoration.mode,
                    tooltip="decoupled: the estimate of every step is corrected; no gradient through the model. psld: the authors' way, "
                    "with a gradient through the model, decoder and encoder; slower, and takes far more memory.",
                ),
                io.Float.Input(
                    "strength", default=Restoration.strength, min=0.0, max=100.0, step=0.05, round=0.0001,
                    tooltip="How much the measurement counts. 0 is off and free. decoupled: 1. psld: the authors' omega, 0.1 to 0.7.",
                ),
                io.Float.Input(
                    "gluing", default=Restoration.gluing, min=0.0, max=10.0, step=0.005, round=0.0001,
                    tooltip="psld: gamma, which keeps to pictures that the VAE can make. Authors: a tenth of strength. 0 saves encoding.",
                ),
                io.Int.Input(
                    "iterations", default=Restoration.iterations, min=1, max=100,
                    tooltip="decoupled: corrections in each evaluation. Each takes two decodes and a backward pass of the decoder.",
                ),
                *window_inputs(),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, vae: Any = None, **settings: Any) -> io.NodeOutput:
        """Attach the rule; a VAE that is missing or another model's is refused here."""
        check_vae(Restoration.name, model.model, vae)
        return guided(cls, model, Restoration(vae=vae, **settings))
