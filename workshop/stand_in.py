"""The demo model in the place of the model files that a workflow asks for, so that it can be run where there are none."""

from __future__ import annotations

from workshop import api

LOADERS = {  # their outputs, as those of the Demo Model
    "CheckpointLoaderSimple": (0, 1, 2),
    "UNETLoader": (0,),
    "DualCLIPLoader": (1,),
    "VAELoader": (2,),
}
CAPTION = "a large purple pentagon on a cream background"
_STAGES = "32x32: {} steps, end 0.57; 64x64: {} steps"
_FLOW = "EmptySD3LatentImage"  # what the workflows of flow models begin with


def needs_files(prompt: api.Prompt) -> bool:
    """Whether a prompt loads models from files."""
    return bool(api.find(prompt, *LOADERS))


def stand_in(prompt: api.Prompt, batch: int = 4, steps: int | None = None) -> None:
    """Change a prompt, in place, to one for the demo model: other loaders, sizes and captions, the same guidance.

    steps: of every sampler, in place of the workflow's own.
    """
    demo = api.add(prompt, "LodestarDemoModel", model="mmdit" if api.find(prompt, _FLOW) else "unet", strength="main")
    outputs = {loader: LOADERS[prompt[loader]["class_type"]] for loader in api.find(prompt, *LOADERS)}
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in outputs:
                node["inputs"][name] = [demo, outputs[value[0]][value[1]]]
    for loader in outputs:
        del prompt[loader]
    _size(prompt, batch, steps)
    _captions(prompt)


def _size(prompt: api.Prompt, batch: int, steps: int | None) -> None:
    """Latents, stages and limits that suit pictures of 32 pixels."""
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] in ("EmptyLatentImage", _FLOW):
            node.update(class_type="EmptyChromaRadianceLatentImage", inputs={"width": 32, "height": 32, "batch_size": batch})
        elif node["class_type"] == "LodestarFreCaS":
            inputs |= {"stages": _STAGES.format(steps or 20, steps or 10), "high_scale": 8.0, "batch_size": batch}
        elif node["class_type"] == "LodestarAPG" and inputs["norm_threshold"]:
            inputs["norm_threshold"] = 5.0
        if steps is not None and "steps" in inputs:
            inputs["steps"] = steps


def _captions(prompt: api.Prompt) -> None:
    """One caption for everything that is not a negative prompt."""
    negative = set()
    for node in prompt.values():
        source = node["inputs"].get("negative")
        while source is not None:
            negative.add(source[0])
            source = prompt[source[0]]["inputs"].get("conditioning")
    for node_id in api.find(prompt, "CLIPTextEncode"):
        prompt[node_id]["inputs"]["text"] = "" if node_id in negative else CAPTION
