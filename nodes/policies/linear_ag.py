"""LinearAG nodes: fit, apply, save, load."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...guiders.policies.linear_ag.coefficients import Coefficients
from ...guiders.policies.linear_ag.fit import NAME as FIT
from ...guiders.policies.linear_ag.fit import fit
from ...guiders.policies.linear_ag.rule import SECOND_HALVES, LinearAG
from .. import files
from ..schema import ATTACHED, CATEGORY, guided, model_input
from ..training_inputs import CATEGORY as TRAINING
from ..training_inputs import run_inputs, runs_of, seed_input

CoefficientsType = io.Custom("GUIDANCE_COEFFICIENTS")
SUFFIX = ".safetensors"


class LodestarLinearAGFit(io.ComfyNode):
    """See guiders/policies/linear_ag/fit.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarLinearAGFit",
            display_name=FIT,
            category=TRAINING,
            description="Samples images with CFG and fits a linear regression that predicts the unconditional prediction. Once per model, "
            "sampler, schedule and cfg; LinearAG: apply then saves evaluations.",
            search_aliases=["linear ag", "adaptive guidance", "fit", "regression", "calibrate"],
            is_input_list=True,
            inputs=[
                *run_inputs(),
                io.Int.Input(
                    "trajectories", default=200, min=1, max=100000,
                    tooltip="Images to sample, as many at a time as latent_image has. The paper uses about 200.",
                ),
                seed_input(),
            ],
            outputs=[
                CoefficientsType.Output("coefficients", tooltip="For LinearAG: apply, or Save Coefficients."),
                io.String.Output("report", tooltip="R² of every replaced step next to those of trivial predictors."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, trajectories: list[int], **inputs: list) -> io.NodeOutput:
        """Fit. All inputs are lists, of which ``positive`` may hold several prompts."""
        coefficients = fit(runs_of(FIT, inputs), trajectories[0])
        return io.NodeOutput(coefficients, coefficients.report())


class LodestarLinearAG(io.ComfyNode):
    """See guiders/policies/linear_ag/rule.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarLinearAG",
            display_name=LinearAG.name,
            category=CATEGORY,
            description="Predicts the unconditional prediction of every second step in the first half instead of evaluating it, and goes "
            "on without it in the second half: 25 evaluations instead of 40 in 20 steps. Needs fitted coefficients.",
            search_aliases=["linear ag", "adaptive guidance", "faster cfg", "skip uncond", "speed"],
            inputs=[
                model_input(),
                CoefficientsType.Input("coefficients", tooltip="From LinearAG: fit or Load Coefficients; for this model, sampler and cfg."),
                io.Combo.Input(
                    "second_half", options=list(SECOND_HALVES), default="conditional", optional=True, advanced=True,
                    tooltip="conditional, as in the paper: one evaluation per step. cfg: plain CFG, for Adaptive Guidance to end it.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the guidance attached.")],
            **ATTACHED,
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, coefficients: Coefficients, second_half: str = "conditional") -> io.NodeOutput:
        """Attach the rule."""
        return guided(cls, model, LinearAG(coefficients=coefficients, second_half=second_half))


class LodestarSaveCoefficients(io.ComfyNode):
    """Coefficients to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarSaveCoefficients",
            display_name="LinearAG: save coefficients",
            category=TRAINING,
            description="Writes fitted LinearAG coefficients as a small safetensors file into models/guidance.",
            search_aliases=["linear ag", "adaptive guidance", "save"],
            is_output_node=True,
            inputs=[
                CoefficientsType.Input("coefficients", tooltip="From LinearAG: fit."),
                files.prefix_input("linear_ag"),
            ],
            outputs=[io.String.Output("file", tooltip="The file's name, as LinearAG: load coefficients lists it.")],
        )

    @classmethod
    def execute(cls, coefficients: Coefficients, filename_prefix: str) -> io.NodeOutput:
        """Never overwrites a file."""
        return files.saved(filename_prefix, SUFFIX, coefficients.save)


class LodestarLoadCoefficients(io.ComfyNode):
    """Coefficients from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarLoadCoefficients",
            display_name="LinearAG: load coefficients",
            category=TRAINING,
            description="Reads LinearAG coefficients from a safetensors file in models/guidance.",
            search_aliases=["linear ag", "adaptive guidance", "load"],
            inputs=[files.file_input(SUFFIX)],
            outputs=[
                CoefficientsType.Output("coefficients", tooltip="For LinearAG: apply."),
                io.String.Output("report", tooltip="What they were fitted for, and R² of every replaced step."),
            ],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        """A file that was not made by the save node is refused."""
        coefficients = Coefficients.load(files.existing(file))
        return io.NodeOutput(coefficients, coefficients.report())

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Load again when the file has changed."""
        return files.fingerprint(file)
