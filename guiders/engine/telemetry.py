"""Messages about runs that go on, for the charts in the nodes of a graph.

Nobody listens unless the part of the pack that knows the web server says so by ``connect``. Without a listener a run makes no Telemetry,
and nothing here is called while it samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .curves import CFG_UPDATE, Quantity
from .keys import NODE, TELEMETRY
from .log import RunLog, joined
from .plan import GuidancePlan, Policy, Rule
from .run import Run

Message = dict[str, Any]  # goes out as JSON
PERIOD = 0.25  # seconds between two messages


class Listener(Protocol):
    """Who gets messages about the sampling calls of one prompt."""

    def present(self) -> bool:
        """Whether anybody would see a message now."""

    def send(self, message: Message) -> None:
        """Pass a message on; each one replaces all earlier ones of its sampler."""


class Stage(Protocol):
    """A stage of a cascade: the size of its pictures in pixels, and its steps."""

    @property
    def width(self) -> int: ...

    @property
    def height(self) -> int: ...

    @property
    def steps(self) -> int: ...


def _nobody() -> Listener | None:
    return None


_find_listener: Callable[[], Listener | None] = _nobody


def connect(find: Callable[[], Listener | None] | None) -> None:
    """From now on ask this, at the start of every sampling call, for its listener; None: there is none any more."""
    global _find_listener
    _find_listener = find or _nobody


def of_run(run: Run, sampler: Any) -> Telemetry | None:
    """The telemetry that a run has to feed: its cascade's, or its own if a node has something to show to somebody."""
    options = run.guider.model_options["transformer_options"]
    if TELEMETRY in options:
        return options[TELEMETRY]
    node = getattr(sampler, NODE, None)
    if node is None and not _shown(run.plan):
        return None
    listener = _find_listener()
    return None if listener is None else Telemetry(listener, node)


def of_cascade(node: str | None, stages: Sequence[Stage]) -> Telemetry | None:
    """One telemetry for all stages of the cascade that a node of the graph runs."""
    listener = None if node is None else _find_listener()
    return None if listener is None else Telemetry(listener, node, stages)


class Telemetry:
    """Tells a listener about one run, or about the runs of a cascade as of one; ``node`` is that of the sampler or the cascade itself."""

    def __init__(self, listener: Listener, node: str | None = None, stages: Sequence[Stage] = ()) -> None:
        self.listener, self.node, self.stages = listener, node, stages
        self.past: list[RunLog] = []
        self.due = 0.0
        self.sent = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Telemetry:
        """Itself, for packs that copy a model's options deeply: a listener has the server at its other end."""
        return self

    def evaluated(self, run: Run) -> None:
        """After an evaluation: a message, unless the last one is too young or nobody is there."""
        now = time.monotonic()
        if now >= self.due and self.listener.present():
            self.due = now + PERIOD
            self._send(run, run.log_so_far())

    def finished(self, run: Run) -> None:
        """The last message of a run, also to somebody who has left since the one before: a page that is loaded again."""
        if self.sent or self.listener.present():
            self._send(run, run.log, over=True)
        self.past.append(run.log)

    def _send(self, run: Run, log: RunLog, over: bool = False) -> None:
        self.sent = True
        before = sum(past.steps for past in self.past)
        whole = joined([*self.past, log])
        message = {
            "step": before + run.evaluation.index + 1,
            "steps": sum(stage.steps for stage in self.stages) or log.steps,
            "nfe": round(whole.nfe, 2),
            "saved": round(whole.saved, 2),
            "evaluations": _points(whole.evaluations),
            "done": over and len(self.past) + 1 >= len(self.stages),
            "nodes": self._nodes(run, log, whole, before),
        }
        if self.stages:
            message["stage"] = len(self.past)
            message["stages"] = [{"width": stage.width, "height": stage.height, "steps": stage.steps} for stage in self.stages]
        self.listener.send(message)

    def _nodes(self, run: Run, log: RunLog, whole: RunLog, before: int) -> dict[str, Message]:
        """By node: its curve, and for a policy that switches, where it does."""
        nodes = {}
        for index, rule, node in _shown(run.plan):
            nodes[node] = _curve(whole, rule.curve or run.updates[index]) | {"policy": isinstance(rule, Policy)}
            if rule.name in log.switches:
                switch = log.switches[rule.name]
                steps = [None if step is None else before + step for step in switch.steps]
                nodes[node]["switch"] = {"threshold": switch.threshold, "steps": steps}
        if self.node is not None:
            nodes[self.node] = _curve(whole, CFG_UPDATE) | {"policy": False}
        return nodes


def _shown(plan: GuidancePlan) -> list[tuple[int, Rule, str]]:
    """The rules that do something and come from a node, with their index in the plan."""
    shown = [(index, entry) for index, entry in enumerate(plan.entries) if entry.node is not None and not entry.rule.neutral]
    return [(index, entry.rule, entry.node) for index, entry in shown]


def _curve(log: RunLog, quantity: Quantity) -> Message:
    return {"curve": quantity.name, "kind": quantity.kind, "points": _points(log.curves.get(quantity, {}))}


def _points(curve: Mapping[int, float]) -> list[tuple[int, float | None]]:
    """Steps with values short enough for a chart; JSON has no word for what is not finite."""
    return [(step, float(f"{value:.5g}") if math.isfinite(value) else None) for step, value in curve.items()]
