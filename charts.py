"""Brings the telemetry of sampling runs to the browser that queued the prompt, where js/charts.js draws it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from comfy_execution.utils import get_executing_context

from .guiders.engine import telemetry

EVENT = "lodestar.run"
ROUTE = "/lodestar/charts"
_MOST_CLIENTS, _MOST_RUNS = 32, 32  # of those that came last


@dataclass
class Client:
    """A page that draws charts, and the last messages of every sampler, for when the page is loaded again."""

    runs: list[telemetry.Message] = field(default_factory=list)

    def keep(self, message: telemetry.Message) -> None:
        """In the order in which samplers ran. Of one sampler, those of its last prompt for different nodes: it may compare models."""
        kept = [run for run in self.runs if not _outdated(run, message)]
        self.runs = [*kept[1 - _MOST_RUNS :], message]


def _outdated(run: telemetry.Message, by: telemetry.Message) -> bool:
    if (run["workflow"], run["sampler"]) != (by["workflow"], by["sampler"]):
        return False
    return run["prompt"] != by["prompt"] or run["nodes"].keys() == by["nodes"].keys()


class Charts:
    """The clients that asked for charts. Pages say by POST whether they draw any: what nobody draws is not computed."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.clients: OrderedDict[str, Client] = OrderedDict()
        self.serial = 0

    async def subscribe(self, request: web.Request) -> web.Response:
        """{"client_id", "on"} -> {"runs"}: what the client has seen so far."""
        asked = await request.json()
        client_id = asked.get("client_id") if isinstance(asked, dict) else None
        if not isinstance(client_id, str) or not client_id:
            return web.json_response({"error": "client_id is missing"}, status=400)
        if not asked.get("on"):
            self.clients.pop(client_id, None)
            return web.json_response({"runs": []})
        client = self.clients.setdefault(client_id, Client())
        self.clients.move_to_end(client_id)
        while len(self.clients) > _MOST_CLIENTS:
            self.clients.popitem(last=False)
        return web.json_response({"runs": client.runs})

    def listener(self) -> Listener | None:
        """For the sampling call that now begins: the client that queued the prompt, if it draws charts."""
        context, client_id = get_executing_context(), self.server.client_id
        if context is None or client_id not in self.clients:
            return None
        prompt, workflow = self._running(context.prompt_id)
        about = {"prompt": context.prompt_id, "sampler": context.node_id, "workflow": workflow}
        return Listener(self, client_id, about, {node_id: _member(node, "class_type") for node_id, node in prompt.items()})

    def _running(self, prompt_id: str) -> tuple[dict[str, Any], str | None]:
        """The nodes of a running prompt, and the id of the workflow that it was made from; a client may have several open."""
        running, _ = self.server.prompt_queue.get_current_queue_volatile()
        for _, running_id, prompt, extra_data, *_ in running:
            if running_id == prompt_id:
                return prompt, _member(_member(_member(extra_data, "extra_pnginfo"), "workflow"), "id")
        return {}, None


def _member(value: Any, key: str) -> Any:
    """A part of what clients have sent, which may be of any shape."""
    return value.get(key) if isinstance(value, dict) else None


@dataclass(frozen=True)
class Listener:
    """One client, about one sampling call. types: the class of every node in the prompt, by which a page knows its own nodes again."""

    charts: Charts
    client_id: str
    about: dict[str, Any]
    types: dict[str, str | None]

    def present(self) -> bool:
        """Whether the client draws charts and its page is connected."""
        return self.client_id in self.charts.clients and self.client_id in self.charts.server.sockets

    def send(self, message: telemetry.Message) -> None:
        """Send, and keep for later; serial tells which of two messages is the newer one."""
        self.charts.serial += 1
        nodes = {node_id: node | {"type": self.types.get(node_id)} for node_id, node in message["nodes"].items()}
        message = self.about | message | {"nodes": nodes, "serial": self.charts.serial}
        client = self.charts.clients.get(self.client_id)
        if client is not None:
            client.keep(message)
            self.charts.server.send_sync(EVENT, message, self.client_id)


def install() -> None:
    """Connect the host's server with the guiders. Where the nodes run without a server there is nothing to connect."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        charts = Charts(server)
        server.routes.post(ROUTE)(charts.subscribe)
        telemetry.connect(charts.listener)
