"""Run: everything that changes during ONE sampling call. Made when it starts, dropped when it ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import and_
from types import FrameType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor

from ..spaces import Layout, beside, cosine_per_sample, is_flow, norm_per_sample, window
from .branches import Branch
from .curves import Curves
from .plan import CFG_UPDATE, Choice, GuidancePlan, Policy, Rows, Shaper, Term

if TYPE_CHECKING:
    from .telemetry import Telemetry

KEY = "lodestar"  # of our wrappers and additional models
RUN = "lodestar_run"
COSINE = "cosine of cond and uncond"  # a curve's label
NARROWED = "lodestar_narrowed"  # in a part of a call: which rows of its chunks (None: all), and their uuids in the whole
OPTIONS_PLACE = 3  # of transformer_options among apply_model's arguments after x and t
_LOGS: WeakKeyDictionary[GuidancePlan, RunLog] = WeakKeyDictionary()


@dataclass
class RunLog:
    """What a finished run did.

    nfe: evaluations of the whole batch. A call with some rows only counts in proportion, so that nfe times batch is the number of rows.
    evaluations: the same for each step. saved: what policies left out of it. choices: what each step's first evaluation was to compute.
    curves: one number per recorded step (mean over the rows) by label. switches: by the name of the policy.
    """

    steps: int = 0
    batch: int = 0
    calls: int = 0
    rows: int = 0
    nfe: float = 0
    saved: float = 0
    seconds: float = 0.0
    sigmas: list[float] = field(default_factory=list)
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    evaluations: dict[int, float] = field(default_factory=dict)
    choices: dict[int, Choice] = field(default_factory=dict)
    switches: dict[str, Switch] = field(default_factory=dict)


@dataclass(frozen=True)
class Switch:
    """A policy's criterion: its curve's label, the threshold, and for each image the first step without guidance (None: there is none)."""

    curve: str
    threshold: float
    steps: tuple[int | None, ...]


@dataclass(frozen=True)
class Step:
    """Where a model evaluation stands. ``memory`` belongs to the rule it is handed to and lives as long as the run.

    index: position in the schedule of the solver step, the same for all its stages.
    sigma: noise level at the start of that step.
    first: whether this is the first evaluation of the step.
    covered: whether the step starts inside the rule's window.
    flow: whether the model's path is x = (1 - t) x0 + t noise.
    record: keeps a curve's values, one for each row, for this step.
    cfg: the sampler's w in this evaluation.
    """

    index: int
    sigma: float
    first: bool
    layout: Layout
    memory: dict[str, Any] = field(default_factory=dict)
    cfg: float = 1.0
    covered: bool = True
    flow: bool = False
    record: Callable[[str, Tensor], None] = lambda label, values: None


class Run:
    """State of one sampling call: schedule position, per-rule memory, predictions of the current evaluation, counters."""

    def __init__(self, plan: GuidancePlan, guider: Any, sigmas: Tensor, shape: tuple[int, ...], latent_shapes: Any) -> None:
        self.plan = plan
        self.guider = guider
        self.sigmas: list[float] = sigmas.tolist()  # the only read of the schedule: later ones would stall a GPU
        self.latent_shapes = latent_shapes
        self.layout = Layout.of(latent_shapes)
        self.model_sampling = guider.model_patcher.get_model_object("model_sampling")
        self.flow = is_flow(self.model_sampling)
        self.memories: dict[int, dict[str, Any]] = {}
        names = [rule.name for rule in plan.rules]
        self.names = [name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}" for i, name in enumerate(names)]
        self.windows = [window(self.model_sampling, rule.start_percent, rule.end_percent) for rule in plan.rules]
        self.index = self.furthest = -1
        self.first = True
        self.wanted: tuple[Branch, ...] = ()
        self.choices: dict[int, Choice] = {}
        self.choice = Choice()
        self.lanes: list[Branch] = []
        self.place = 0
        self.needed: Sequence[Rows] = ()
        self.cond: Tensor | None = None
        self.others: dict[Branch, Tensor] = {}
        self.shaped: Tensor | None = None
        self.stopped = False  # whether a policy has set the sampler's cfg to 1, where the host drops D_u by itself
        self.cfg = 1.0
        self.weak: dict[Any, Any] = {}
        self.log = RunLog(steps=len(self.sigmas) - 1, batch=shape[0], sigmas=self.sigmas)
        self.telemetry: Telemetry | None = None  # only while somebody watches
        self._curves = Curves(self.log.curves)
        self._began = time.perf_counter()

    @cached_property
    def terms(self) -> list[tuple[int, Term]]:
        """Active terms with their place in the plan."""
        return self.plan.active(Term)

    @cached_property
    def shapers(self) -> list[tuple[int, Shaper]]:
        """Active shapers with their place in the plan."""
        return self.plan.active(Shaper)

    @cached_property
    def policies(self) -> list[tuple[int, Policy]]:
        """Active policies with their place in the plan."""
        return self.plan.active(Policy)

    def covers(self, index: int) -> bool:
        """Whether the current solver step starts inside the window of rule number ``index``: sigma_end < sigma <= sigma_start."""
        high, low = self.windows[index]
        return low < self.sigmas[self.index] <= high

    def begin_evaluation(self, sigma: Tensor) -> None:
        """Find the solver step that asks for this evaluation and forget the last evaluation's predictions."""
        index = solver_step(len(self.sigmas))
        if index is None:
            index = nearest_step(self.sigmas, float(sigma.max()))
        elif index < self.index:  # the sampler's loop starts again, on the next part of a video
            self.furthest = -1
            self.memories.clear()
        self.first = index > self.furthest
        self.index, self.furthest = index, max(index, self.furthest)
        self.cond, self.others, self.shaped, self.stopped = None, {}, None, False
        self.choices = {i: policy.choose(self.step(i)) for i, policy in self.policies}
        self._combine()
        wanted = tuple(dict.fromkeys(branch for i, term in self.terms if self.covers(i) for branch in term.branches))
        self.wanted = wanted if self.choice.terms else ()
        self.spare(len(wanted), self.choice.terms)

    def revise(self, index: int, choice: Choice | None) -> None:
        """Narrow the current evaluation by what policy number ``index`` has seen in it."""
        if choice is not None:
            self.choices[index] &= choice
            self._combine()

    def _combine(self) -> None:
        self.choice = reduce(and_, self.choices.values(), Choice())
        if self.first:
            self.log.choices[self.index] = self.choice

    @contextmanager
    def in_front(self, lanes: list[Branch], place: int) -> Iterator[None]:
        """While the host evaluates extra lanes in front of its own, where the conditional one is number ``place``."""
        self.lanes, self.place = lanes, place
        try:
            yield
        finally:
            self.lanes = []

    @contextmanager
    def only(self, *needed: Rows) -> Iterator[None]:
        """While the host evaluates lanes of which these rows are needed."""
        self.needed = needed
        try:
            yield
        finally:
            self.needed = ()

    def rows_of(self, label: int) -> Rows:
        """The rows that are needed of a lane."""
        return self.needed[label] if label < len(self.needed) else True

    def branch_of(self, label: int) -> Branch | None:
        """The branch that a number in ``cond_or_uncond`` stands for; None for the sampler's own lanes."""
        return self.lanes[label] if label < len(self.lanes) else None

    def host_labels(self, labels: Sequence[int]) -> list[int]:
        """``cond_or_uncond`` as it would be without us: an extra branch counts as cond."""
        extra = len(self.lanes)
        return [self.place if label < extra else label - extra for label in labels]

    def step(self, index: int) -> Step:
        """The current step as rule number ``index`` sees it."""
        memory = self.memories.setdefault(index, {})
        return Step(
            self.index, self.sigmas[self.index], self.first, self.layout, memory,
            cfg=self.cfg, covered=self.covers(index), flow=self.flow, record=self.record,
        )  # fmt: skip

    def count(self, rows: int, chunks: float) -> None:
        """One model call of ``rows`` rows that holds ``chunks`` branches, or parts of them."""
        self.log.calls += 1
        self.log.rows += rows
        self.log.nfe += chunks
        self.log.evaluations[self.index] = self.log.evaluations.get(self.index, 0) + chunks

    def spare(self, branches: int, rows: Rows) -> None:
        """Branches of which only these rows are evaluated."""
        self.log.saved += branches * (1 - (float(rows) if isinstance(rows, bool) else sum(rows) / len(rows)))

    def record(self, label: str, values: Tensor) -> None:
        """Keep a curve's value [B] for this step; it stays on the device until the run ends."""
        if self.first:
            self._curves.record(label, self.index, values.detach().float().mean())

    def record_predictions(self, cond: Tensor | None, uncond: Tensor | None) -> None:
        """Curves of the sampler's own predictions, where both were evaluated."""
        if cond is not None and uncond is not None and self.first:
            if isinstance(self.choice.uncond, tuple):
                rows = beside(cond, [i for i, guided in enumerate(self.choice.uncond) if guided])
                cond, uncond = cond[rows], uncond[rows]
            self.record(CFG_UPDATE, norm_per_sample(cond - uncond, self.layout) / norm_per_sample(cond, self.layout))
            self.record(COSINE, cosine_per_sample(cond, uncond, self.layout))

    def record_update(self, index: int, before: Tensor, after: Tensor) -> None:
        """Curve of what rule number ``index`` changed, relative to the denoised image."""
        if self.first:
            self.record(self.names[index], norm_per_sample(after - before, self.layout) / norm_per_sample(before, self.layout))

    def log_so_far(self) -> RunLog:
        """The log with what the device has handed over of the curves; does not wait for it."""
        self._curves.glance()
        self._note_policies()
        return self.log

    def finish(self) -> None:
        """Bring the curves to the CPU and publish the log under the plan."""
        self.log.seconds = time.perf_counter() - self._began
        self._curves.read()
        self._note_policies()
        _LOGS[self.plan] = self.log

    def _note_policies(self) -> None:
        for index, policy in self.policies:
            policy.note(self.memories.get(index, {}), self.log)


def last_log(plan: GuidancePlan) -> RunLog | None:
    """The log of the last run that used this plan."""
    return _LOGS.get(plan)


def publish(plan: GuidancePlan, logs: Sequence[RunLog]) -> None:
    """Publish several runs in a row as one log under a plan."""
    _LOGS[plan] = joined(logs)


def joined(logs: Sequence[RunLog]) -> RunLog:
    """Several runs in a row as one log. When policies switched is left out: they did so in every run."""
    whole = RunLog(batch=logs[0].batch)
    for log in logs:
        by_step = [(whole.curves.setdefault(label, {}), points) for label, points in log.curves.items()]
        for target, points in (*by_step, (whole.evaluations, log.evaluations), (whole.choices, log.choices)):
            target.update({whole.steps + step: value for step, value in points.items()})
        whole.sigmas = [*whole.sigmas[: whole.steps], *log.sigmas]
        for name in ("steps", "calls", "rows", "nfe", "saved", "seconds"):
            setattr(whole, name, getattr(whole, name) + getattr(log, name))
    return whole


_LOOPS = (("i", "sigmas"), ("step_index", "timesteps"))  # k-diffusion, UniPC


def solver_step(levels: int) -> int | None:
    """Index of the solver step that is asking for an evaluation, read off the sampler's own loop; None if it has no such loop.

    Nothing else tells the second stage of a Heun step from the first stage of the next one (same noise level), and comparing noise
    levels would have to wait for the GPU at every step.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        names = (*frame.f_code.co_varnames, *frame.f_code.co_cellvars)  # a variable that a comprehension reads is a cell
        for counter, schedule in _LOOPS:
            if counter in names and schedule in names:
                i, sigmas = frame.f_locals.get(counter), frame.f_locals.get(schedule)
                if isinstance(i, int) and isinstance(sigmas, Tensor) and len(sigmas) == levels and 0 <= i < levels - 1:
                    return i
        frame = frame.f_back
    return None


def nearest_step(sigmas: list[float], sigma: float) -> int:
    """The last step of the schedule that starts at or above ``sigma``."""
    return max((i for i, level in enumerate(sigmas[:-1]) if level >= sigma * (1 - 1e-4)), default=0)


def run_of(model_options: dict[str, Any]) -> Run | None:
    """The run that a sampling call's options carry."""
    return model_options.get("transformer_options", {}).get(RUN)
