"""Inputs that several nodes share."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..guiders.engine.attach import attach
from ..guiders.engine.plan import Rule

CATEGORY = "lodestar/guidance"
PLACE = (io.Hidden.unique_id, io.Hidden.dynprompt)  # what a schema has to ask for so that ``place_of`` knows the node
# In the schema of nodes whose result bears their place: the host must not take that of an equal node elsewhere.
ATTACHED: dict[str, Any] = {"hidden": list(PLACE), "not_idempotent": True}


def model_input(tooltip: str = "The model to guide. Chain several guidance nodes in any order.") -> io.Model.Input:
    """The MODEL that a rule is attached to."""
    return io.Model.Input("model", tooltip=tooltip)


def window_inputs() -> list[io.Input]:
    """Share of the schedule in which a rule acts."""
    return [
        io.Float.Input(
            "start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
            tooltip="Where the effect begins, as a share of the schedule (0 is pure noise, 1 is the finished image).",
        ),
        io.Float.Input(
            "end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
            tooltip="Where the effect ends, as a share of the schedule (0 is pure noise, 1 is the finished image).",
        ),
    ]  # fmt: skip


def place_of(node: type[io.ComfyNode]) -> str | None:
    """Id of the node that is being executed, as the user's graph has it: of an expanded one, that of the node it was made by."""
    hidden = node.hidden
    if hidden is None or hidden.unique_id is None:
        return None
    return hidden.unique_id if hidden.dynprompt is None else hidden.dynprompt.get_display_node_id(hidden.unique_id)


def guided(node: type[io.ComfyNode], model: Any, rule: Rule) -> io.NodeOutput:
    """The model with a node's rule attached."""
    return io.NodeOutput(attach(model, rule, place_of(node)))


def check_window(node: str, start_percent: float, end_percent: float) -> None:
    """Raise ValueError for a window that ends before it begins."""
    if start_percent > end_percent:
        raise ValueError(f"{node}: start_percent {start_percent} lies after end_percent {end_percent}.")
