"""Messages about runs that go on, for the charts in the nodes of a graph.

Nobody listens unless the part of the pack that knows the web server says so by ``connect``. Without a listener a run makes no Telemetry
and a sampler, fit or search no Trace, and nothing here is called while they go on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from .curves import CFG_UPDATE, Curves, Quantity
from .keys import TELEMETRY
from .log import RunLog, joined
from .plan import GuidancePlan, Policy, Rule, Shaper
from .run import Run

Message = dict[str, Any]  # goes out as JSON
PERIOD = 0.25  # seconds between two messages


class Listener(Protocol):
    """Who gets messages about the sampling calls of one prompt."""

    def present(self) -> bool:
        """Whether anybody would see a message now."""

    def send(self, message: Message) -> None:
        """Pass a message on; each one replaces all earlier ones about the same nodes."""


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


def of_run(run: Run) -> Telemetry | None:
    """The telemetry that a run has to feed: its cascade's, or its own if a node has something to show to somebody."""
    options = run.guider.model_options["transformer_options"]
    if TELEMETRY in options:
        return options[TELEMETRY]
    listener = _find_listener() if _shown(run.plan) else None
    return None if listener is None else Telemetry(listener)


def of_cascade(node: str | None, stages: Sequence[Stage]) -> Telemetry | None:
    """One telemetry for all stages of the cascade that a node of the graph runs."""
    listener = None if node is None else _find_listener()
    return None if listener is None else Telemetry(listener, node, stages)


@contextmanager
def tracing(node: str | None, quantity: Quantity, steps: int, unit: str = "step") -> Iterator[Trace | None]:
    """For what is no rule, around its loop: the trace to which it adds its values. None: there is nobody for whom to compute them."""
    listener = None if node is None else _find_listener()
    if listener is None:
        yield None
        return
    trace = Trace(listener, node, quantity, steps, unit)
    try:
        yield trace
    finally:
        trace.finish()


class Trace:
    """Tells a listener about the one curve of a node that is no rule: a sampler, an inversion, a fit or a search.

    steps: how many values there will be. unit: what each of them belongs to, "step", "run" or "iteration".
    """

    def __init__(self, listener: Listener, node: str, quantity: Quantity, steps: int, unit: str) -> None:
        self.listener, self.node, self.quantity = listener, node, quantity
        self.about: Message = {"step": 0, "steps": steps, "unit": unit}
        self.curves = Curves()
        self.due = 0.0

    def add(self, index: int, value: Tensor | float, **facts: Any) -> None:
        """The value number ``index``, a tensor [] on any device or a plain number. ``facts`` join the message, as of now."""
        self.about |= {"step": index + 1, **facts}
        if isinstance(value, Tensor):
            self.curves.record(self.quantity, index, value)
        else:
            self.curves.values.setdefault(self.quantity, {})[index] = value
        now = time.monotonic()
        if now >= self.due and self.listener.present():
            self.due = now + PERIOD
            self.curves.collect_ready()
            self._send(done=False)

    def finish(self) -> None:
        """The last message."""
        if self.curves.values and (self.due or self.listener.present()):
            self.curves.read()
            self._send(done=True)

    def _send(self, done: bool) -> None:
        node = _curve(self.curves.values, self.quantity) | {"role": "trace"}
        self.listener.send(self.about | {"done": done, "nodes": {self.node: node}})


class Telemetry:
    """Tells a listener about one run, or about the runs of a cascade as of one; ``node`` is that of the cascade itself."""

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
            "unit": "step",
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
        """By node: its role and its curve; of a shaper also that of plain CFG, of a policy where it switches and what it predicts."""
        nodes = {}
        for index, rule, node in _shown(run.plan):
            nodes[node] = _curve(whole.curves, rule.curve or run.updates[index]) | {"role": _role(rule)}
            if isinstance(rule, Shaper):
                nodes[node]["plain"] = _points(_plain_cfg(run, whole))
            if isinstance(rule, Policy):
                nodes[node]["predicted"] = [step for step, choice in whole.choices.items() if choice.predicted]
            if rule.name in log.switches:
                switch = log.switches[rule.name]
                steps = [None if step is None else before + step for step in switch.steps]
                nodes[node]["switch"] = {"threshold": switch.threshold, "steps": steps}
        if self.node is not None:
            nodes[self.node] = _curve(whole.curves, CFG_UPDATE) | {"role": "cascade"}
        return nodes


def _role(rule: Rule) -> str:
    return "shaper" if isinstance(rule, Shaper) else "policy" if isinstance(rule, Policy) else "term"


def _plain_cfg(run: Run, log: RunLog) -> dict[int, float]:
    """Size of the update that CFG would make without shapers, (w - 1) |D_c - D_u| / |D_c|; nothing for guiders without a w."""
    cfg = getattr(run.guider, "cfg", None)
    if cfg is None:
        return {}
    weights = {step: choice.weight for step, choice in log.choices.items() if choice.weight is not None}
    return {step: abs(weights.get(step, cfg) - 1) * value for step, value in log.curves.get(CFG_UPDATE, {}).items()}


def _shown(plan: GuidancePlan) -> list[tuple[int, Rule, str]]:
    """The rules that do something and come from a node, with their index in the plan."""
    shown = [(index, entry) for index, entry in enumerate(plan.entries) if entry.node is not None and not entry.rule.neutral]
    return [(index, entry.rule, entry.node) for index, entry in shown]


def _curve(curves: Mapping[Quantity, Mapping[int, float]], quantity: Quantity) -> Message:
    return {"curve": quantity.name, "kind": quantity.kind, "points": _points(curves.get(quantity, {}))}


def _points(curve: Mapping[int, float]) -> list[tuple[int, float | None]]:
    """Steps with values short enough for a chart; JSON has no word for what is not finite."""
    return [(step, float(f"{value:.5g}") if math.isfinite(value) else None) for step, value in curve.items()]
