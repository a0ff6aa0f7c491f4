"""Run: everything that changes during ONE sampling call. Made when it starts, dropped when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, reduce
from operator import and_
from typing import Any, Protocol

from torch import Tensor

from ..spaces import Layout, cosine_per_sample, is_flow, norm_per_sample, on_device_of
from .branches import Branch
from .choice import Choice, Rows
from .curves import CFG_UPDATE, COSINE, Curves
from .keys import RUN
from .log import RunLog, publish
from .plan import GuidancePlan, Policy, Shaper, Term
from .schedule import nearest_step, solver_step, window
from .step import Step


class Watcher(Protocol):
    """Follows a run while it goes on."""

    def step(self, run: Run) -> None:
        """After every evaluation."""

    def finish(self, run: Run) -> None:
        """When the run has ended."""


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
        self.index = self.last_index = -1
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
        self.weak: dict[Any, Any] = {}
        self.log = RunLog(steps=len(self.sigmas) - 1, batch=shape[0], sigmas=self.sigmas)
        self.watcher: Watcher | None = None
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
            self.last_index = -1
            self.memories.clear()
        self.first = index > self.last_index
        self.index, self.last_index = index, max(index, self.last_index)
        self.cond, self.others, self.shaped, self.stopped = None, {}, None, False
        self.choices = {i: policy.choose(self.step(i)) for i, policy in self.policies}
        self._combine()
        wanted = tuple(dict.fromkeys(branch for i, term in self.terms if self.covers(i) for branch in term.branches))
        self.wanted = wanted if self.choice.terms else ()
        self.count_saved(len(wanted), self.choice.terms)

    def narrow(self, index: int, choice: Choice | None) -> None:
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
            covered=self.covers(index), flow=self.flow, record=self.record,
        )  # fmt: skip

    def count(self, rows: int, chunks: float) -> None:
        """One model call of ``rows`` rows that holds ``chunks`` branches, or parts of them."""
        self.log.calls += 1
        self.log.rows += rows
        self.log.nfe += chunks
        self.log.evaluations[self.index] = self.log.evaluations.get(self.index, 0) + chunks

    def count_saved(self, branches: int, rows: Rows) -> None:
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
                rows = on_device_of(cond, [i for i, guided in enumerate(self.choice.uncond) if guided])
                cond, uncond = cond[rows], uncond[rows]
            self.record(CFG_UPDATE, norm_per_sample(cond - uncond, self.layout) / norm_per_sample(cond, self.layout))
            self.record(COSINE, cosine_per_sample(cond, uncond, self.layout))

    def record_update(self, index: int, before: Tensor, after: Tensor) -> None:
        """Curve of what rule number ``index`` changed, relative to the denoised image."""
        if self.first:
            self.record(self.names[index], norm_per_sample(after - before, self.layout) / norm_per_sample(before, self.layout))

    def log_so_far(self) -> RunLog:
        """The log with what the device has handed over of the curves; does not wait for it."""
        self._curves.collect_ready()
        self._note_policies()
        return self.log

    def finish(self) -> None:
        """Bring the curves to the CPU and publish the log under the plan."""
        self.log.seconds = time.perf_counter() - self._began
        self._curves.read()
        self._note_policies()
        publish(self.plan, self.log)

    def _note_policies(self) -> None:
        for index, policy in self.policies:
            policy.note(self.memories.get(index, {}), self.log)


def run_of(model_options: dict[str, Any]) -> Run | None:
    """The run that a sampling call's options carry."""
    return model_options.get("transformer_options", {}).get(RUN)
