"""A line of text on the node that is being executed, by ComfyUI's own means: how far it is, or where a file went."""

from __future__ import annotations

from collections.abc import Callable

from comfy_api.latest import io

from .schema import graph_id


def writer(node: type[io.ComfyNode]) -> Callable[[str], None]:
    """Shows a text on the node of the graph that is being executed, in the place of the one before. Outside of a prompt there is none."""
    shown_on = graph_id(node)

    def write(text: str) -> None:
        if shown_on is not None:
            from server import PromptServer  # here: other nodes can do without

            PromptServer.instance.send_progress_text(text, shown_on)

    return write
