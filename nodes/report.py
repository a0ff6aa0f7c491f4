"""Guidance Report node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..guiders.engine.log import last_log
from ..guiders.engine.plan import plan_of
from ..pictures.report import draw, table

UI = "lodestar_report"  # among a prompt's outputs in the host's history: the log as plain values, for programs


class LodestarReport(io.ComfyNode):
    """Shows the log of the model's last sampling run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarReport",
            display_name="Guidance Report",
            category="lodestar/report",
            description="What guidance did in the last sampling run of a model: evaluations, time, "
            "and the size of each update over the steps.",
            search_aliases=["nfe", "log", "curve", "statistics", "cost"],
            inputs=[
                io.Model.Input("model", tooltip="The same MODEL that goes into the sampler."),
                io.Latent.Input("latent", tooltip="The sampler's output, so that the report is made after sampling. Passed on unchanged."),
            ],
            outputs=[
                io.Latent.Output(tooltip="The latent, unchanged."),
                io.Image.Output("picture", tooltip="Curves over the steps."),
                io.String.Output("table", tooltip="NFE, rows, calls and seconds as text."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, latent: dict[str, Any]) -> io.NodeOutput:
        """Find the log under the plan that the model carries."""
        plan = plan_of(model.model_options)
        if plan is None:
            raise ValueError("Guidance Report: this model carries no Lodestar node; connect the MODEL that goes into the sampler.")
        log = last_log(plan)
        if log is None:
            raise ValueError("Guidance Report: this model has not been sampled yet; connect the sampler's LATENT output to latent.")
        return io.NodeOutput(latent, draw(log), table(log), ui={UI: [log.to_json()]})
