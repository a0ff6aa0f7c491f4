"""FreCaS nodes: the whole cascade, and the transition between two stages."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..guiders.frecas.cascade import Cascade
from ..guiders.frecas.stages import NAME, Stage
from ..guiders.frecas.transition import RESIZES, advance, begin
from .schema import HIDDEN, graph_id

CATEGORY = "lodestar/sampling"
_SEED = {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}


def _gamma(note: str) -> io.Float.Input:
    return io.Float.Input(
        "gamma", default=-1.0, min=-1.0, max=10.0, step=0.1,
        tooltip=f"How much more noise a larger stage begins with. -1 is the authors' value for the model{note}; 0 adds none.",
    )  # fmt: skip


def _resize() -> io.Combo.Input:
    return io.Combo.Input(
        "resize", options=list(RESIZES), default="nearest", tooltip="How pictures are enlarged between stages. Authors: nearest."
    )


def _scheduler() -> io.Combo.Input:
    return io.Combo.Input(
        "scheduler", options=comfy.samplers.SCHEDULER_NAMES, default="normal",
        tooltip="Spacing of the noise levels inside a stage. Authors: evenly in time, which is normal.",
    )  # fmt: skip


class LodestarFreCaS(io.ComfyNode):
    """See guiders/frecas/cascade.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarFreCaS",
            display_name=NAME,
            category=CATEGORY,
            description="Pictures larger than the model was trained for, in a fraction of the time and without repeated objects: "
            "sampled in stages of growing size, detail last.",
            search_aliases=["frecas", "high resolution", "hires fix", "upscale", "2k", "4k", "cascade"],
            inputs=[
                io.Model.Input("model", tooltip="The model. Guidance nodes on it work in every stage."),
                io.Conditioning.Input("positive", tooltip="What to show. Areas in pixels are those of the first stage."),
                io.Conditioning.Input("negative", tooltip="What to avoid."),
                io.Vae.Input("vae", tooltip="Between stages the picture is decoded, enlarged and encoded."),
                io.Int.Input("seed", tooltip="Seed of all noise; each stage has a stream of its own.", **_SEED),
                io.Float.Input(
                    "cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01,
                    tooltip="CFG weight in the first stage, and of the low frequencies in the others.",
                ),
                io.Combo.Input("sampler", options=comfy.samplers.SAMPLER_NAMES, default="euler", tooltip="The solver inside every stage."),
                _scheduler(),
                io.String.Input(
                    "stages", default="auto 2048x2048", multiline=True,
                    tooltip="'auto 2048x2048' for the authors' stages, or your own: '1024x1024: 40 steps, end 0.57; 2048x2048: 10 steps'. "
                    "end is the noise level (sigma) at which the next stage takes over. ', windows 2x2' at the end of a stage, or of auto, "
                    "divides its self-attention and saves much at 2K and above.",
                ),
                _gamma(" and the number of stages"),
                io.Float.Input(
                    "high_scale", default=35.0, min=0.0, max=1000.0, step=0.5,
                    tooltip="CFG weight of the detail that a stage adds. Authors: 35 to 45. Equal to cfg is plain CFG.",
                ),
                io.Float.Input(
                    "map_weight", default=0.6, min=0.0, max=1.0, step=0.05,
                    tooltip="Share of the previous stage's cross-attention maps, which keep the layout. UNets and SD3. Paper: 0.4 to 0.6.",
                ),
                _resize(),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures at once, where no latent is connected."),
                io.Latent.Input(
                    "latent", optional=True,
                    tooltip="To paint into a picture: its latent with a noise mask, of any size. Also for videos: an empty latent.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The last stage's result."),
                io.Latent.Output("stage_latents", is_output_list=True, tooltip="Every stage's clean picture, for previews."),
            ],
            hidden=list(HIDDEN),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, positive: list, negative: list, seed: int, stages: str, batch_size: int, latent: dict[str, Any] | None = None, **settings: Any
    ) -> io.NodeOutput:  # fmt: skip
        """Run all stages; the other inputs are fields of the cascade."""
        cascade = Cascade.read(stages, node=graph_id(cls), **settings)
        results = cascade.sample(positive, negative, seed, cascade.latent(latent, batch_size))
        return io.NodeOutput(results[-1], results)


class LodestarStageTransition(io.ComfyNode):
    """See guiders/frecas/transition.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarStageTransition",
            display_name="FreCaS Stage Transition",
            category=CATEGORY,
            description="The step between two stages of a cascade, to build one from ComfyUI's own samplers: enlarges the clean "
            "picture of a stage and gives it the noise and the noise levels that the next stage begins with.",
            search_aliases=["frecas", "cascade", "renoise", "second pass", "hires fix", "upscale latent"],
            inputs=[
                io.Model.Input("model", tooltip="The model of the next stage; its noise schedule is used."),
                io.Vae.Input("vae", tooltip="Decodes, and encodes the enlarged picture."),
                io.Int.Input("width", default=2048, min=8, max=16384, step=8, tooltip="Width of the next stage, in pixels."),
                io.Int.Input("height", default=2048, min=8, max=16384, step=8, tooltip="Height of the next stage, in pixels."),
                io.Int.Input("steps", default=10, min=1, max=10000, tooltip="Steps of the next stage."),
                io.Float.Input(
                    "end", default=0.0, min=0.0, max=1000.0, step=0.001, round=False,
                    tooltip="Noise level (sigma) of the next stage's last evaluation, if another one follows; 0 for the last stage.",
                ),
                _scheduler(),
                _gamma(" in two stages"),
                _resize(),
                io.Int.Input("seed", tooltip="The cascade's seed, the same in all its transitions.", **_SEED),
                io.Int.Input("stage", default=1, min=0, max=1000, tooltip="Number of the next stage, from 0: picks its stream of noise."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures at once, for the first stage only."),
                io.Latent.Input(
                    "denoised", optional=True,
                    tooltip="The previous sampler's denoised output. Leave it and sigmas unconnected for the first stage.",
                ),
                io.Sigmas.Input("sigmas", optional=True, tooltip="The noise levels that the previous sampler was given."),
            ],
            outputs=[
                io.Latent.Output(tooltip="For a sampler that adds no noise; for the first stage an empty latent, and the sampler adds it."),
                io.Sigmas.Output(tooltip="The next stage's noise levels."),
                io.Int.Output("stage_seed", tooltip="The next stage's seed, for its sampler."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, vae: Any, width: int, height: int, steps: int, end: float, scheduler: str, gamma: float, resize: str, seed: int,
        stage: int, batch_size: int, denoised: dict[str, Any] | None = None, sigmas: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        """Begin the first stage, or the next one."""
        target = Stage(width, height, steps, end)
        if denoised is None and sigmas is None:
            start = begin(model, vae, target, scheduler, seed, batch_size)
        else:
            start = advance(model, vae, target, scheduler, seed, stage, gamma, resize, denoised, sigmas)
        return io.NodeOutput({"samples": start.latent}, start.sigmas, start.seed)
