"""The workflow templates run by the host's executor with the demo model in the place of model files."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.samplers
import execution
from torch import Tensor

import nodes

Prompt = dict[str, dict[str, Any]]
LOADERS = {"CheckpointLoaderSimple": (0, 1, 2), "UNETLoader": (0,), "DualCLIPLoader": (1,), "VAELoader": (2,)}  # outputs as Demo Model's
CAPTION = "a large purple pentagon on a cream background"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
MUTED, BYPASSED = 2, 4
STEPS, BATCH = 6, 2
LONG = {"LodestarPolicySearch": {"iterations": 4}, "LodestarLinearAGFit": {"trajectories": 8}}  # shorter than users want it


class Server:
    """What the executor asks of a server: nothing."""

    client_id = last_node_id = last_prompt_id = None
    sockets_metadata: dict = {}  # noqa: RUF012

    def send_sync(self, *_: Any, **__: Any) -> None:
        """Nobody listens."""

    queue_updated = send_progress_text = send_sync


def cases(folder: Path) -> dict[str, Callable[[], None]]:
    """A case for every workflow file in a folder."""
    return {f"templates/{path.stem}": functools.partial(run, path) for path in sorted(folder.glob("*.json"))}


def run(path: Path) -> None:
    """Execute a workflow; its latents count, not its pictures, of which some show seconds. Raises RuntimeError where it fails."""
    prompt = to_prompt(json.loads(path.read_text(encoding="utf-8")))
    if find(prompt, *LOADERS):
        stand_in(prompt)
    shorten(prompt)
    saved = nodes.SaveImage.save_images
    nodes.SaveImage.save_images = lambda *_, **__: {"ui": {"images": []}}
    try:
        execute(prompt)
    finally:
        nodes.SaveImage.save_images = saved


def execute(prompt: Prompt) -> None:
    """Validate and run a prompt."""
    valid = asyncio.run(execution.validate_prompt("unchanged", prompt, None))
    if not valid[0]:
        raise RuntimeError(f"the host refuses the prompt: {valid[1]} {valid[3]}")
    executor = execution.PromptExecutor(Server(), cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
    executor.execute(prompt, "unchanged", {}, sorted(valid[2]))  # otherwise in an order of their own each time
    for kind, message in executor.status_messages:
        if kind == "execution_error":
            raise RuntimeError(f"{message['node_type']}: {message['exception_message']}")


# --- from workflow file to prompt ------------------------------------------------------------------------------------


def to_prompt(workflow: dict[str, Any]) -> Prompt:
    """A workflow as the front end saves it in the form that the server queues."""
    by_id = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt: Prompt = {}
    for node in by_id.values():
        if node["type"] in ("Note", "MarkdownNote") or node["mode"] in (MUTED, BYPASSED):
            continue
        inputs = dict(zip(widget_names(node["type"]), node.get("widgets_values") or (), strict=False))
        inputs.pop("", None)
        for socket in node["inputs"]:
            origin = _origin(socket["link"], by_id, links)
            if origin is not None:
                inputs[socket["name"]] = [str(origin[0]), origin[1]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def widget_names(node_id: str) -> Iterator[str]:
    """The inputs whose values a workflow file lists, in its order; "" for the control that follows a seed."""
    kind = nodes.NODE_CLASS_MAPPINGS[node_id]
    groups = kind.GET_NODE_INFO_V1()["input"] if hasattr(kind, "GET_NODE_INFO_V1") else kind.INPUT_TYPES()
    for group in ("required", "optional"):
        for name, (type_, *options) in groups.get(group, {}).items():
            config = options[0] if options else {}
            if not (isinstance(type_, (list, tuple)) or type_ in WIDGETS) or config.get("forceInput"):
                continue
            yield name
            if config.get("control_after_generate"):
                yield ""


def _origin(link: int | None, by_id: dict[int, Any], links: dict[int, tuple[int, int]]) -> tuple[int, int] | None:
    while link is not None:
        node_id, slot = links[link]
        node = by_id[node_id]
        if node["mode"] == MUTED:
            return None
        if node["mode"] != BYPASSED:
            return node_id, slot
        kind = node["outputs"][slot]["type"]
        link = next((socket["link"] for socket in node["inputs"] if socket["type"] == kind), None)
    return None


def find(prompt: Prompt, *kinds: str) -> list[str]:
    """The ids of a prompt's nodes of these types."""
    return [node_id for node_id, node in prompt.items() if node["class_type"] in kinds]


# --- the demo model --------------------------------------------------------------------------------------------------


def stand_in(prompt: Prompt) -> None:
    """Change a prompt, in place, to one for the demo model: other loaders, sizes and captions, the same guidance."""
    demo = str(1 + max(map(int, prompt)))
    outputs = {node_id: LOADERS[prompt[node_id]["class_type"]] for node_id in find(prompt, *LOADERS)}
    flow = bool(find(prompt, "EmptySD3LatentImage"))
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in outputs:
                node["inputs"][name] = [demo, outputs[value[0]][value[1]]]
    for node_id in outputs:
        del prompt[node_id]
    for node in prompt.values():
        if node["class_type"] in ("EmptyLatentImage", "EmptySD3LatentImage"):
            node.update(class_type="EmptyChromaRadianceLatentImage", inputs={"width": 32, "height": 32, "batch_size": BATCH})
        elif node["class_type"] == "CLIPTextEncode":
            node["inputs"]["text"] = CAPTION if node["inputs"]["text"] else ""
        elif node["class_type"] == "LodestarFreCaS":
            node["inputs"] |= {"stages": f"32x32: {STEPS} steps, end 0.57; 64x64: {STEPS} steps", "high_scale": 8.0}
    prompt[demo] = {"class_type": "LodestarDemoModel", "inputs": {"model": "mmdit" if flow else "unet", "strength": "main"}}


def shorten(prompt: Prompt) -> None:
    """Smaller batches and fewer steps, the same for all nodes, because fits and policies have to suit their samplers."""
    for node in prompt.values():
        inputs = node["inputs"]
        if isinstance(inputs.get("batch_size"), int):
            inputs["batch_size"] = min(inputs["batch_size"], BATCH)
        if isinstance(inputs.get("steps"), int) and inputs["steps"] > STEPS:
            inputs["steps"] = STEPS
        inputs |= LONG.get(node["class_type"], {})


def recorded_latents(record: Callable[[Tensor], None]) -> None:
    """From now on call ``record`` with the latent of every sampling call of the host."""
    plain = comfy.samplers.CFGGuider.sample

    @functools.wraps(plain)
    def sample(*args: Any, **kwargs: Any) -> Tensor:
        result = plain(*args, **kwargs)
        record(result)
        return result

    comfy.samplers.CFGGuider.sample = sample
