"""Guidance policy nodes: search, apply, save, load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ...guiders.policies.search import NAME as SEARCH
from ...guiders.policies.search import search
from ...guiders.policies.weights_per_step import StepWeights, StepwiseCFG
from ..files import About, Kind, save_and_load
from ..progress import writer
from ..schema import HIDDEN, graph_id, guidance_schema, guided
from ..training_inputs import CATEGORY, run_inputs, runs_of, seed_input

PolicyType = io.Custom("GUIDANCE_POLICY")


class LodestarPolicySearch(io.ComfyNode):
    """See guiders/policies/search.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarPolicySearch",
            display_name=SEARCH,
            category=CATEGORY,
            description="Finds, by gradient descent through the sampler, which steps need CFG and how strong: close to the CFG result with "
            "fewer evaluations. Takes about ten times as long per image as sampling.",
            search_aliases=["policy", "schedule search", "nas", "cfg per step"],
            is_input_list=True,
            inputs=[
                *run_inputs(),
                io.Int.Input(
                    "iterations", default=100, min=1, max=100000,
                    tooltip="Steps of gradient descent, each on new noise for latent_image's batch.",
                ),
                io.Float.Input(
                    "cost_weight", default=0.05, min=0.0, max=100.0, step=0.001, round=0.0001,
                    tooltip="What CFG's evaluations cost in all, against the squared relative distance to its result. "
                    "More finds cheaper policies.",
                ),
                seed_input(),
            ],
            outputs=[
                PolicyType.Output("policy", tooltip="For Guidance policy: apply, or Guidance policy: save."),
                io.String.Output("json", tooltip="The policy as text, with one choice for every step."),
                io.String.Output("report", tooltip="Loss, distance and evaluations during the search."),
            ],
            hidden=list(HIDDEN),
        )  # fmt: skip

    @classmethod
    def execute(cls, iterations: list[int], cost_weight: list[float], **inputs: list) -> io.NodeOutput:
        """Search. All inputs are lists, of which ``positive`` may hold several prompts."""
        policy, report = search(runs_of(SEARCH, inputs), iterations[0], cost_weight[0], graph_id(cls), writer(cls))
        return io.NodeOutput(policy, policy.to_json(), report)


class LodestarGuidancePolicy(io.ComfyNode):
    """See guiders/policies/weights_per_step.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return guidance_schema(
            StepwiseCFG,
            node_id="LodestarGuidancePolicy",
            description="Samples with a policy: at every step the conditional prediction, the unconditional one, or CFG at a weight of its "
            "own. Only what a step uses is evaluated.",
            search_aliases=["policy", "cfg schedule", "cfg per step", "speed"],
            inputs=[PolicyType.Input("policy", tooltip="From Guidance policy search or Guidance policy: load.")],
        )

    @classmethod
    def execute(cls, model: Any, policy: StepWeights) -> io.NodeOutput:
        """Attach the rule."""
        return guided(cls, model, StepwiseCFG(policy=policy))


def _read(path: Path) -> tuple[StepWeights, str]:
    policy = StepWeights.load(path)
    return policy, policy.to_json()


LodestarSavePolicy, LodestarLoadPolicy = save_and_load(
    Kind("guidance", ".json", prefix="policy", made_by=SEARCH),
    save=About(
        node_id="LodestarSavePolicy",
        display_name="Guidance policy: save",
        description="Writes a guidance policy as a readable JSON file into models/guidance.",
        search_aliases=["policy", "cfg schedule", "save"],
    ),
    load=About(
        node_id="LodestarLoadPolicy",
        display_name="Guidance policy: load",
        description="Reads a guidance policy from a JSON file in models/guidance, found by a search or written by hand.",
        search_aliases=["policy", "cfg schedule", "load"],
    ),
    value=PolicyType.Input("policy", tooltip="From Guidance policy search."),
    outputs=[
        PolicyType.Output("policy", tooltip="For Guidance policy: apply."),
        io.String.Output("json", tooltip="The policy as text, with one choice for every step."),
    ],
    write=StepWeights.save,
    read=_read,
)
