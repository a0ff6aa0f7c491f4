"""Compare Guidance node."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..guiders import comparison
from ..pictures.comparison import LabelledPictures, draw, table

_PREFIX = "model"
_MOST = 12


class LodestarCompare(io.ComfyNode):
    """See guiders/comparison.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        model = io.Model.Input("model", tooltip="One column of the comparison: a model with the guidance nodes it is to be sampled with.")
        return io.Schema(
            node_id="LodestarCompare",
            display_name=comparison.NAME,
            category="lodestar/report",
            description="Samples several models with the same noise and settings, and shows their pictures side by side, "
            "with the cost and the saturation of each.",
            search_aliases=["compare", "grid", "xy plot", "side by side", "ab test", "contact sheet"],
            inputs=[
                io.Autogrow.Input(
                    "models", template=io.Autogrow.TemplatePrefix(model, prefix=_PREFIX, min=1, max=_MOST),
                    tooltip="What is compared, one column each. A new socket appears when the last one is connected.",
                ),
                io.Conditioning.Input("positive", tooltip="What to show."),
                io.Conditioning.Input("negative", tooltip="What to avoid."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise. Each of its entries becomes a row."),
                io.Vae.Input("vae", tooltip="Decodes the pictures of all columns."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**64 - 1, control_after_generate=True,
                    tooltip="Seed of the noise, the same for all columns.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Steps of the sampler, for each column."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="CFG weight, for all columns."),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.SAMPLER_NAMES, default="euler", tooltip="The solver, for all columns."
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="normal", tooltip="Spacing of the noise levels."
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                    tooltip="How much of the latent is made anew; less than 1 keeps the structure of a given picture.",
                ),
                io.String.Input(
                    "labels", default="", multiline=True,
                    tooltip="Names of the columns, a line for each socket. An empty line: the model's guidance and its settings.",
                ),
            ],
            outputs=[
                io.Image.Output("picture", tooltip="The grid: a column for each model, a row for each entry of the latent."),
                io.String.Output("table", tooltip="Evaluations (NFE), seconds and mean saturation of each column."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, models: io.Autogrow.Type, latent_image: dict[str, Any], vae: Any, labels: str, **settings: Any) -> io.NodeOutput:
        """Sample all columns, then decode them, so that the VAE is loaded once."""
        shared = comparison.Comparison(latent=latent_image, **settings)
        connected = {socket: model for socket, model in models.items() if model is not None}
        names = {socket: _label(labels, socket) or comparison.describe(model, shared.cfg) for socket, model in connected.items()}
        sampled = shared.run([comparison.NamedModel(_called(socket, names[socket]), model) for socket, model in connected.items()])
        columns = [
            LabelledPictures(name, _decode(vae, one.samples), one.nfe, one.seconds)
            for name, one in zip(names.values(), sampled, strict=True)
        ]
        return io.NodeOutput(draw(columns, shared.settings), table(columns, shared.settings))


def _label(labels: str, socket: str) -> str:
    """The line of ``labels`` that belongs to a socket: by its number, so that disconnecting another one shifts no name."""
    number = int(socket.removeprefix(_PREFIX))
    return dict(enumerate(labels.splitlines())).get(number, "").strip()


def _called(socket: str, name: str) -> str:
    """What messages call a column."""
    return f"{socket} ({name.splitlines()[0]})"


def _decode(vae: Any, samples: Any) -> Any:
    """Pictures [N, H, W, 3] on the CPU, as the host's VAE Decode makes them; the frames of videos one after the other."""
    images = vae.decode(samples.unbind()[0] if samples.is_nested else samples)
    return images.reshape(-1, *images.shape[-3:]).float().cpu()
