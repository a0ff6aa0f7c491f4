"""RunLog: what a sampling run did, for reports, charts and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any
from weakref import WeakKeyDictionary

from .choice import Choice
from .curves import Quantity


@dataclass(frozen=True)
class Switch:
    """A policy's criterion: what it measures, the threshold, and for each image the first step without guidance (None: there is none)."""

    curve: Quantity
    threshold: float
    steps: tuple[int | None, ...]


@dataclass
class RunLog:
    """What a finished run did.

    nfe: evaluations of the whole batch. A call with some rows only counts in proportion, so that nfe times batch is the number of rows.
    evaluations: the same for each step. saved: what policies left out of it. choices: what each step's first evaluation was to compute.
    shares: by the short name of a term, which share of an evaluation its rows were computed for, for each step in which that is known; what
    comes before its change of the network is shared. unshared: because of whose function less is shared than could be.
    spent: what rules spent besides evaluations, by its name (decodes, encodes, backward), counted as nfe is.
    curves: one number per recorded step (mean over the rows) of every quantity. switches: by the name of the policy.
    """

    steps: int = 0
    batch: int = 0
    calls: int = 0
    rows: int = 0
    nfe: float = 0
    saved: float = 0
    seconds: float = 0.0
    sigmas: list[float] = field(default_factory=list)
    curves: dict[Quantity, dict[int, float]] = field(default_factory=dict)
    evaluations: dict[int, float] = field(default_factory=dict)
    shares: dict[str, dict[int, float]] = field(default_factory=dict)
    unshared: str = ""
    spent: dict[str, float] = field(default_factory=dict)
    choices: dict[int, Choice] = field(default_factory=dict)
    switches: dict[str, Switch] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All but the choices as plain values, for programs. Points are [step, value], where null is a value that is not finite."""
        curves = [{"name": of.name, "kind": of.kind, "points": _points(curve)} for of, curve in self.curves.items()]
        switches = [
            {"rule": rule, "curve": switch.curve.name, "threshold": switch.threshold, "steps": list(switch.steps)}
            for rule, switch in self.switches.items()
        ]
        return {
            "steps": self.steps, "batch": self.batch, "nfe": self.nfe, "rows": self.rows, "calls": self.calls, "saved": self.saved,
            "seconds": self.seconds, "sigmas": self.sigmas, "evaluations": _points(self.evaluations), "curves": curves,
            "switches": switches, "shares": {name: mean(of_term.values()) for name, of_term in self.shares.items()},
            "unshared": self.unshared, "spent": self.spent,
        }  # fmt: skip


def _points(curve: Mapping[int, float]) -> list[list[float | None]]:
    return [[step, value if math.isfinite(value) else None] for step, value in curve.items()]


_LOGS: WeakKeyDictionary[object, RunLog] = WeakKeyDictionary()  # by GuidancePlan, which is made of more than this file knows


def last_log(plan: object) -> RunLog | None:
    """The log of the last run that used this plan."""
    return _LOGS.get(plan)


def publish(plan: object, log: RunLog) -> None:
    """From now on this is the last log of the plan."""
    _LOGS[plan] = log


def joined(logs: Sequence[RunLog]) -> RunLog:
    """Several runs in a row as one log. When policies switched is left out: they did so in every run."""
    whole = RunLog(batch=logs[0].batch)
    for log in logs:
        by_step = [(whole.curves.setdefault(quantity, {}), points) for quantity, points in log.curves.items()]
        by_step += [(whole.shares.setdefault(name, {}), points) for name, points in log.shares.items()]
        whole.unshared = whole.unshared or log.unshared
        for target, points in (*by_step, (whole.evaluations, log.evaluations), (whole.choices, log.choices)):
            target.update({whole.steps + step: value for step, value in points.items()})
        for name, spent in log.spent.items():
            whole.spent[name] = whole.spent.get(name, 0) + spent
        whole.sigmas = [*whole.sigmas[: whole.steps], *log.sigmas]
        for name in ("steps", "calls", "rows", "nfe", "saved", "seconds"):
            setattr(whole, name, getattr(whole, name) + getattr(log, name))
    return whole
