"""The host's HTTP interface: turn a workflow file into a prompt, queue it, and fetch what it made. Standard library only."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from workshop.serving import NO_PROXY

Prompt = dict[str, dict[str, Any]]

MUTED, BYPASSED = 2, 4  # a node's `mode` in a workflow file
_NOTES = ("Note", "MarkdownNote")
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


class PromptError(Exception):
    """What the server says is wrong with a prompt, in a sentence for the user."""


class Client:
    """A running server at ``url``."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._node_types: dict[str, Any] | None = None

    def get(self, path: str, **query: str) -> bytes:
        """The body of one GET request."""
        with NO_PROXY.open(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
            return answer.read()

    def get_json(self, path: str, **query: str) -> Any:
        """The same, parsed."""
        return json.loads(self.get(path, **query))

    @property
    def node_types(self) -> dict[str, Any]:
        """What the server knows about each of its nodes; asked for once."""
        if self._node_types is None:
            self._node_types = self.get_json("/object_info")
        return self._node_types

    def queue(self, prompt: Prompt) -> str:
        """Queue a prompt and return its id. Raises PromptError when the server refuses it."""
        body = json.dumps({"prompt": prompt}).encode()
        try:
            with NO_PROXY.open(f"{self.url}/prompt", data=body, timeout=60) as answer:
                return json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise PromptError(_refusal(json.load(error))) from None

    def wait(self, prompt_id: str, tick: Callable[[], None] = lambda: None, seconds: float = 3600) -> dict[str, Any]:
        """Wait for a prompt's end, calling ``tick`` meanwhile; returns its outputs by node id. Raises PromptError if it failed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            history = self.get_json(f"/history/{prompt_id}")
            if prompt_id in history:
                _raise_failure(history[prompt_id]["status"])
                return history[prompt_id]["outputs"]
            tick()
            time.sleep(0.1)
        raise PromptError(f"The server did not finish within {seconds:.0f} s.")

    def run(self, prompt: Prompt, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Queue a prompt and wait for its outputs."""
        return self.wait(self.queue(prompt), tick)

    def images(self, output: Mapping[str, Any]) -> list[bytes]:
        """The image files that one output node has written."""
        fields = ("filename", "subfolder", "type")
        return [self.get("/view", **{name: image[name] for name in fields}) for image in output["images"]]


def _refusal(answer: Mapping[str, Any]) -> str:
    """The server's reasons for refusing a prompt."""
    reasons = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in (answer.get("node_errors") or {}).values()
        for error in node["errors"]
    ]
    return "; ".join(reasons) or answer["error"]["message"]


def _raise_failure(status: Mapping[str, Any]) -> None:
    if status["status_str"] == "success":
        return
    for kind, message in status["messages"]:
        if kind == "execution_error":
            raise PromptError(f"{message['node_type']}: {message['exception_message'].strip()}")
    raise PromptError("The server stopped the prompt.")


# ------------------------------------------------------------------------------------------- workflow file to prompt


def to_prompt(workflow: Mapping[str, Any], node_types: Mapping[str, Any]) -> Prompt:
    """A workflow as the front end saves it, in the form that the server queues. Knows plain graphs, no subgraphs.

    Notes and muted nodes are left out; links through a bypassed node go on to its first input of the same type.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt: Prompt = {}
    for node in nodes.values():
        kind = node["type"]
        if kind in _NOTES or node["mode"] in (MUTED, BYPASSED):
            continue
        if kind not in node_types:
            raise PromptError(f"The server has no node {kind}.")
        inputs = dict(zip(widget_names(node_types[kind]), node.get("widgets_values") or (), strict=False))
        inputs.pop("", None)
        for socket in node["inputs"]:
            origin = _origin(socket["link"], nodes, links)
            if origin is not None:
                inputs[socket["name"]] = [str(origin[0]), origin[1]]
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs}
    return prompt


def widget_names(node_type: Mapping[str, Any]) -> Iterator[str]:
    """The inputs whose values a workflow file lists, in its order; "" for the control that follows a seed."""
    for group in ("required", "optional"):
        for name, (kind, *options) in node_type["input"].get(group, {}).items():
            config = options[0] if options else {}
            if not (isinstance(kind, list) or kind in _WIDGETS) or config.get("forceInput"):
                continue
            yield name
            if config.get("control_after_generate"):
                yield ""


def _origin(link: int | None, nodes: Mapping[int, Any], links: Mapping[int, tuple[int, int]]) -> tuple[int, int] | None:
    """The node and output that a link comes from, past bypassed nodes; None without one."""
    while link is not None:
        node_id, slot = links[link]
        node = nodes[node_id]
        if node["mode"] == MUTED:
            return None
        if node["mode"] != BYPASSED:
            return node_id, slot
        kind = node["outputs"][slot]["type"]
        link = next((socket["link"] for socket in node["inputs"] if socket["type"] == kind), None)
    return None


# ------------------------------------------------------------------------------------------------------ prompt editing


def find(prompt: Prompt, *kinds: str) -> list[str]:
    """The ids of a prompt's nodes of these types."""
    return [node_id for node_id, node in prompt.items() if node["class_type"] in kinds]


def add(prompt: Prompt, kind: str, **inputs: Any) -> str:
    """Add a node and return its id."""
    node_id = str(1 + max(map(int, prompt), default=0))
    prompt[node_id] = {"class_type": kind, "inputs": inputs}
    return node_id


def keep_only(prompt: Prompt, wanted: list[str]) -> Prompt:
    """The part of a prompt that the ``wanted`` nodes depend on."""
    kept: Prompt = {}
    todo = list(wanted)
    while todo:
        node_id = todo.pop()
        if node_id not in kept:
            kept[node_id] = prompt[node_id]
            todo += [value[0] for value in prompt[node_id]["inputs"].values() if isinstance(value, list)]
    return kept
