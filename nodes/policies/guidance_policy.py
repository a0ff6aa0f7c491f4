"""Guidance policy nodes: search, apply, save, load."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ...guiders.policies.search import NAME as SEARCH
from ...guiders.policies.search import search
from ...guiders.policies.weights_per_step import StepWeights, StepwiseCFG
from .. import files
from ..schema import ATTACHED, CATEGORY, guided, model_input
from ..training_inputs import CATEGORY as TRAINING
from ..training_inputs import run_inputs, runs_of, seed_input

PolicyType = io.Custom("GUIDANCE_POLICY")
SUFFIX = ".json"


class LodestarPolicySearch(io.ComfyNode):
    """See guiders/policies/search.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarPolicySearch",
            display_name=SEARCH,
            category=TRAINING,
            description="Finds, by gradient descent through the sampler, which steps need CFG and how strong: close to the CFG result with "
            "fewer evaluations. Takes about ten times as long per image as sampling.",
            search_aliases=["policy", "schedule search", "adaptive guidance", "nas", "dynamic cfg"],
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
        )  # fmt: skip

    @classmethod
    def execute(cls, iterations: list[int], cost_weight: list[float], **inputs: list) -> io.NodeOutput:
        """Search. All inputs are lists, of which ``positive`` may hold several prompts."""
        policy, report = search(runs_of(SEARCH, inputs), iterations[0], cost_weight[0])
        return io.NodeOutput(policy, policy.to_json(), report)


class LodestarGuidancePolicy(io.ComfyNode):
    """See guiders/policies/weights_per_step.py."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarGuidancePolicy",
            display_name=StepwiseCFG.name,
            category=CATEGORY,
            description="Samples with a policy: at every step the conditional prediction, the unconditional one, or CFG at a weight of its "
            "own. Only what a step uses is evaluated.",
            search_aliases=["policy", "cfg schedule", "dynamic cfg", "adaptive guidance", "speed"],
            inputs=[model_input(), PolicyType.Input("policy", tooltip="From Guidance policy search or Guidance policy: load.")],
            outputs=[io.Model.Output(tooltip="The model with the guidance attached.")],
            **ATTACHED,
        )

    @classmethod
    def execute(cls, model: Any, policy: StepWeights) -> io.NodeOutput:
        """Attach the rule."""
        return guided(cls, model, StepwiseCFG(policy=policy))


class LodestarSavePolicy(io.ComfyNode):
    """A policy to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarSavePolicy",
            display_name="Guidance policy: save",
            category=TRAINING,
            description="Writes a guidance policy as a readable JSON file into models/guidance.",
            search_aliases=["policy", "cfg schedule", "save"],
            is_output_node=True,
            inputs=[PolicyType.Input("policy", tooltip="From Guidance policy search."), files.prefix_input("policy")],
            outputs=[io.String.Output("file", tooltip="The file's name, as Guidance policy: load lists it.")],
        )

    @classmethod
    def execute(cls, policy: StepWeights, filename_prefix: str) -> io.NodeOutput:
        """Never overwrites a file."""
        return files.saved(filename_prefix, SUFFIX, policy.save)


class LodestarLoadPolicy(io.ComfyNode):
    """A policy from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema."""
        return io.Schema(
            node_id="LodestarLoadPolicy",
            display_name="Guidance policy: load",
            category=TRAINING,
            description="Reads a guidance policy from a JSON file in models/guidance, found by a search or written by hand.",
            search_aliases=["policy", "cfg schedule", "load"],
            inputs=[files.file_input(SUFFIX)],
            outputs=[
                PolicyType.Output("policy", tooltip="For Guidance policy: apply."),
                io.String.Output("json", tooltip="The policy as text, with one choice for every step."),
            ],
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        """A file that is not a policy is refused."""
        policy = StepWeights.load(files.existing(file))
        return io.NodeOutput(policy, policy.to_json())

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        """Load again when the file has changed."""
        return files.fingerprint(file)
