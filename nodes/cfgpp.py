"""CFG++ nodes: the sampler, and inversion."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..guiders.cfgpp.inversion import invert
from ..guiders.cfgpp.sampler import INVERSION, LARGEST_LAMBDA, SAMPLER, cfgpp_sampler
from ..guiders.cfgpp.solvers import HISTORIES, SOLVERS
from .schema import ATTACHED, HIDDEN, graph_id

CATEGORY = "lodestar/sampling"


def lambda_input(tooltip: str) -> io.Float.Input:
    """The weight of CFG++."""
    return io.Float.Input("lambda_", display_name="lambda", default=0.6, min=0.0, max=LARGEST_LAMBDA, step=0.01, tooltip=tooltip)


class LodestarCFGPP(io.ComfyNode):
    """See guiders/cfgpp/solvers.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarCFGPP",
            display_name=SAMPLER,
            category=CATEGORY,
            description="Samplers that guide the picture but not the noise: fewer artifacts at strong guidance, and invertible. "
            "For SamplerCustom and SamplerCustomAdvanced with CFGGuider. Costs what CFG costs.",
            search_aliases=["cfg++", "cfgpp", "cfg_pp", "manifold", "euler_cfg_pp", "dpmpp_2m_cfg_pp"],
            inputs=[
                io.Combo.Input(
                    "sampler", options=list(SOLVERS), default="euler",
                    tooltip="euler is DDIM, the paper's own. The ancestral ones and dpmpp_2m_sde add noise.",
                ),
                lambda_input(
                    "Strength of the prompt: 0 ignores it, 1 is the paper's most, 2 ours. 0.6 is about cfg 7 in 50 steps, 3 in 20. "
                    "The cfg of the sampler node or guider is not used: leave it at 1.",
                ),
                io.Float.Input(
                    "eta", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Share of fresh noise in euler_ancestral, dpmpp_2s_ancestral and dpmpp_2m_sde; 0 makes them deterministic. "
                    "euler and dpmpp_2m never add noise.",
                ),
                io.Combo.Input(
                    "history", options=list(HISTORIES), default="unconditional", advanced=True,
                    tooltip="What dpmpp_2m and dpmpp_2m_sde compare with the last step: the unconditional prediction, as the paper's rule "
                    "has it, or the guided one, as ComfyUI's dpmpp_2m_cfg_pp.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="The sampler, for SamplerCustom or SamplerCustomAdvanced.")],
            **ATTACHED,
        )  # fmt: skip

    @classmethod
    def execute(cls, sampler: str, lambda_: float, eta: float, history: str) -> io.NodeOutput:
        """Make the sampler."""
        return io.NodeOutput(cfgpp_sampler(sampler, lambda_, eta, history, graph_id(cls)))


class LodestarCFGPPInvert(io.ComfyNode):
    """See guiders/cfgpp/inversion.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarCFGPPInvert",
            display_name=INVERSION,
            category=CATEGORY,
            description="Finds the noise from which the CFG++ sampler makes a given picture again, or, with another prompt, an edited one. "
            "Costs what sampling costs.",
            search_aliases=["cfg++", "ddim inversion", "invert", "edit", "noise from image"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample, with all that guides it."),
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; the same as in sampling. It may be empty."),
                io.Latent.Input("latent_image", tooltip="The picture, from VAE Encode."),
                io.Sigmas.Input("sigmas", tooltip="The schedule of sampling, from noise to picture; it is gone through backwards."),
                lambda_input("Strength of the prompt, as in the CFG++ sampler: use the same value there. Smaller is more faithful."),
            ],
            outputs=[
                io.Latent.Output(tooltip="The noise, for SamplerCustom with add_noise off, or SamplerCustomAdvanced with DisableNoise."),
                io.Sigmas.Output(tooltip="The schedule that leads back. On flow models it starts just below 1, not at it."),
            ],
            hidden=list(HIDDEN),
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, positive: Any, negative: Any, latent_image: dict, sigmas: Any, lambda_: float) -> io.NodeOutput:
        """Invert."""
        return io.NodeOutput(*invert(model, positive, negative, latent_image, sigmas, lambda_, graph_id(cls)))
