"""A line of text on the node that is being executed, by ComfyUI's own means: how far it is, or where a file went."""

from __future__ import annotations


def write_on(node: str | None, text: str) -> None:
    """Show a text on a node of the graph, in the place of the one before. None: nobody sees the node, as outside of a prompt."""
    if node is None:
        return
    from server import PromptServer  # here: other nodes can do without

    PromptServer.instance.send_progress_text(text, node)
