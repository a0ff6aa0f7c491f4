"""Inputs of the nodes that learn from sampling runs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..guiders.learning.runs import Runs

CATEGORY = "lodestar/training"


def run_inputs() -> list[io.Input]:
    """Everything that one sampling call takes."""
    return [
        io.Model.Input("model", tooltip="The model that you will sample with, with its LoRAs, and without nodes that skip CFG."),
        io.Conditioning.Input("positive", tooltip="The prompt. The prompts of a list (Create List) take turns."),
        io.Conditioning.Input("negative", tooltip="The negative prompt that you will sample with; the paper's is empty."),
        io.Latent.Input("latent_image", tooltip="An empty latent of the size that you sample. Its batch is sampled at once."),
        io.Sampler.Input("sampler", tooltip="The sampler that you will sample with."),
        io.Sigmas.Input("sigmas", tooltip="The schedule that you will sample with, from Basic Scheduler: same scheduler, same steps."),
        io.Float.Input(
            "cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="The cfg that you will sample with. The paper's is 7.5."
        ),
    ]  # fmt: skip


def seed_input() -> io.Input:
    """Where the noise comes from."""
    return io.Int.Input(
        "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip="Seed of the first run's noise; the following ones count on from it.",
    )  # fmt: skip


def runs_of(name: str, inputs: dict[str, list[Any]]) -> Runs:
    """The runs that a node's inputs, all of them lists, describe. Raises ValueError for several values where one is asked for."""
    several = [key for key, values in inputs.items() if len(values) > 1 and key != "positive"]
    if several:
        raise ValueError(f"{name}: only positive may be a list; {several[0]} holds {len(inputs[several[0]])} values.")
    single = {key: values[0] for key, values in inputs.items() if key != "positive"}
    latent = single.pop("latent_image")
    return Runs(name=name, positive=inputs["positive"], latent=latent, **single)
