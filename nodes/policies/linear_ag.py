"""LinearAG nodes: fit, apply, save, load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ...guiders.policies.linear_ag.coefficients import Coefficients
from ...guiders.policies.linear_ag.fit import NAME as FIT
from ...guiders.policies.linear_ag.fit import fit
from ...guiders.policies.linear_ag.rule import SECOND_HALVES, LinearAG
from ..files import About, Kind, save_and_load
from ..progress import writer
from ..schema import HIDDEN, graph_id, guidance_schema, guided
from ..training_inputs import CATEGORY, run_inputs, runs_of, seed_input

CoefficientsType = io.Custom("GUIDANCE_COEFFICIENTS")


class LodestarLinearAGFit(io.ComfyNode):
    """See guiders/policies/linear_ag/fit.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarLinearAGFit",
            display_name=FIT,
            category=CATEGORY,
            description="Samples images with CFG and fits a linear regression that predicts the unconditional prediction. Once per model, "
            "sampler, schedule and cfg; LinearAG: apply then saves evaluations.",
            search_aliases=["linear ag", "fit", "regression", "calibrate"],
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
                CoefficientsType.Output("coefficients", tooltip="For LinearAG: apply, or LinearAG: save coefficients."),
                io.String.Output("report", tooltip="R² of every replaced step next to those of trivial predictors."),
            ],
            hidden=list(HIDDEN),
        )  # fmt: skip

    @classmethod
    def execute(cls, trajectories: list[int], **inputs: list) -> io.NodeOutput:
        """Fit. All inputs are lists, of which ``positive`` may hold several prompts."""
        coefficients = fit(runs_of(FIT, inputs), trajectories[0], graph_id(cls), writer(cls))
        return io.NodeOutput(coefficients, coefficients.report())


class LodestarLinearAG(io.ComfyNode):
    """See guiders/policies/linear_ag/rule.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return guidance_schema(
            LinearAG,
            node_id="LodestarLinearAG",
            description="Predicts the unconditional prediction of every second step in the first half instead of evaluating it, and goes "
            "on without it in the second half: 25 evaluations instead of 40 in 20 steps. Needs fitted coefficients.",
            search_aliases=["linear ag", "faster cfg", "skip uncond", "speed"],
            inputs=[
                CoefficientsType.Input(
                    "coefficients", tooltip="From LinearAG: fit or LinearAG: load coefficients, for this model, sampler and cfg."
                ),
                io.Combo.Input(
                    "second_half", options=list(SECOND_HALVES), default=LinearAG.second_half, optional=True, advanced=True,
                    tooltip="conditional, as in the paper: one evaluation per step. cfg: plain CFG, for Adaptive Guidance to end it.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, **settings: Any) -> io.NodeOutput:
        """Attach the rule; the inputs are its fields."""
        return guided(cls, model, LinearAG(**settings))


def _read(path: Path) -> tuple[Coefficients, str]:
    coefficients = Coefficients.load(path)
    return coefficients, coefficients.report()


LodestarSaveCoefficients, LodestarLoadCoefficients = save_and_load(
    Kind("guidance", ".safetensors", prefix="linear_ag", made_by=FIT),
    save=About(
        node_id="LodestarSaveCoefficients",
        display_name="LinearAG: save coefficients",
        description="Writes fitted LinearAG coefficients as a small safetensors file into models/guidance.",
        search_aliases=["linear ag", "save"],
    ),
    load=About(
        node_id="LodestarLoadCoefficients",
        display_name="LinearAG: load coefficients",
        description="Reads LinearAG coefficients from a safetensors file in models/guidance.",
        search_aliases=["linear ag", "load"],
    ),
    value=CoefficientsType.Input("coefficients", tooltip="From LinearAG: fit."),
    outputs=[
        CoefficientsType.Output("coefficients", tooltip="For LinearAG: apply."),
        io.String.Output("report", tooltip="What they were fitted for, and R² of every replaced step."),
    ],
    write=Coefficients.save,
    read=_read,
)
