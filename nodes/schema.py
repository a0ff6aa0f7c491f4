"""What the nodes of guidance rules share: their schema, the inputs that several of them have, and how a rule is attached."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..guiders.engine.attach import attach
from ..guiders.engine.plan import Rule

CATEGORY = "lodestar/guidance"
HIDDEN = (io.Hidden.unique_id, io.Hidden.dynprompt)  # what a schema has to ask for so that ``graph_id`` knows the node
# In the schema of nodes whose result bears their id: the host must not take that of an equal node elsewhere.
ATTACHED: dict[str, Any] = {"hidden": list(HIDDEN), "not_idempotent": True}


def guidance_schema(rule: type[Rule], *, node_id: str, description: str, search_aliases: list[str], inputs: list[io.Input]) -> io.Schema:
    """The schema of a node that attaches a rule to a model: the model goes in before the other ``inputs`` and comes out guided."""
    return io.Schema(
        node_id=node_id,
        display_name=rule.name,
        category=CATEGORY,
        description=description,
        search_aliases=search_aliases,
        inputs=[io.Model.Input("model", tooltip="The model to guide. Chain several guidance nodes in any order."), *inputs],
        outputs=[io.Model.Output(tooltip="The model with the guidance attached.")],
        **ATTACHED,
    )


def window_inputs(start: float = Rule.start_percent, end: float = Rule.end_percent) -> list[io.Input]:
    """Share of the schedule in which a rule acts, with the values of a fresh node."""
    return [
        io.Float.Input(
            "start_percent", default=start, min=0.0, max=1.0, step=0.001,
            tooltip="Where the effect begins, as a share of the schedule (0 is pure noise, 1 is the finished image).",
        ),
        io.Float.Input(
            "end_percent", default=end, min=0.0, max=1.0, step=0.001,
            tooltip="Where the effect ends, as a share of the schedule (0 is pure noise, 1 is the finished image).",
        ),
    ]  # fmt: skip


def guided(node: type[io.ComfyNode], model: Any, rule: Rule) -> io.NodeOutput:
    """The model with a node's rule attached. Raises ValueError for a window that ends before it begins."""
    if rule.start_percent > rule.end_percent:
        raise ValueError(f"{rule.name}: start_percent {rule.start_percent} lies after end_percent {rule.end_percent}.")
    return io.NodeOutput(attach(model, rule, graph_id(node)))


def graph_id(node: type[io.ComfyNode]) -> str | None:
    """Id of the node that is being executed, as the user's graph has it: of an expanded one, that of the node it was made by."""
    hidden = node.hidden
    if hidden is None or hidden.unique_id is None:
        return None
    return hidden.unique_id if hidden.dynprompt is None else hidden.dynprompt.get_display_node_id(hidden.unique_id)
