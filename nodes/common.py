"""Inputs that several nodes share."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "lodestar/guidance"


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


def check_window(node: str, start_percent: float, end_percent: float) -> None:
    """Raise ValueError for a window that ends before it begins."""
    if start_percent > end_percent:
        raise ValueError(f"{node}: start_percent {start_percent} lies after end_percent {end_percent}.")
