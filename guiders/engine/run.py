"""Run: everything that changes during ONE sampling call. Made when it starts, dropped when it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from ..spaces import Layout, cosine_per_sample, is_flow, norm_per_sample, on_device_of
from .branches import Branch
from .choice import Choice, Rows
from .curves import CFG_UPDATE, COSINE, Curves, Quantity
from .evaluation import Evaluation
from .host import is_one_video
from .keys import RUN
from .log import RunLog, publish
from .plan import GuidancePlan, Policy, Shaper, Term
from .schedule import Position, window
from .step import Step


class Watcher(Protocol):
    """Follows a run while it goes on."""

    def evaluated(self, run: Run) -> None:
        """After every evaluation."""

    def finished(self, run: Run) -> None:
        """When the run has ended."""


class Run:
    """State of one sampling call: its position in the schedule, the rules' memories, the current evaluation, counters and curves."""

    def __init__(self, plan: GuidancePlan, guider: Any, sigmas: Tensor, shape: tuple[int, ...], latent_shapes: Any) -> None:
        self.plan = plan
        self.guider = guider
        self.sigmas: list[float] = sigmas.tolist()  # the only read of the schedule: later ones would stall a GPU
        self.latent_shapes = latent_shapes
        self.layout = Layout.of(latent_shapes)
        self.model_sampling = guider.model_patcher.get_model_object("model_sampling")
        self.flow = is_flow(self.model_sampling)
        self.reads_uncond = False  # whether the sampler's own steps use D_u
        self.updates = [Quantity(name, "update") for name in _numbered([rule.name for rule in plan.rules])]
        self.windows = [window(self.model_sampling, rule.start_percent, rule.end_percent) for rule in plan.rules]
        self.position = Position(self.sigmas)
        self.memories: dict[int, dict[str, Any]] = {}
        self.evaluation = Evaluation()
        self.weak_models: dict[Any, Any] = {}  # those of autoguidance, by their patchers
        self.log = RunLog(steps=len(self.sigmas) - 1, batch=shape[0], sigmas=self.sigmas)
        self.watcher: Watcher | None = None
        self.shares: dict[Hashable, list[float]] = {}  # of each chunk, by what a forward pass consists of. See sharing.py
        self._curves = Curves(self.log.curves)
        self._counting = threading.Lock()
        self._began = time.perf_counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        """Itself: packs that copy the options of a sampling call deeply, while it goes on, mean the same call."""
        return self

    @cached_property
    def terms(self) -> list[tuple[int, Term]]:
        """Active terms with their index in the plan."""
        return self.plan.active(Term)

    @cached_property
    def shapers(self) -> list[tuple[int, Shaper]]:
        """Active shapers with their index in the plan."""
        return self.plan.active(Shaper)

    @cached_property
    def policies(self) -> list[tuple[int, Policy]]:
        """Active policies with their index in the plan."""
        return self.plan.active(Policy)

    @cached_property
    def labels(self) -> list[str]:
        """Short names of the active terms, in their order."""
        return _numbered([term.short for _, term in self.terms])

    # --- one evaluation after the other ---

    def begin_sampling(self) -> None:
        """The host has encoded the conds: they say whether the batch is one video."""
        self.layout = replace(self.layout, one_video=is_one_video(self.guider, self.log.batch))

    def begin_evaluation(self, sigma: Tensor) -> Evaluation:
        """Find the solver step that asks, and what this evaluation computes."""
        index, first = self.position.advance(sigma, self.memories.clear)
        evaluation = self.evaluation = Evaluation(index, first)
        for i, policy in self.policies:
            evaluation.choices[i] = policy.choose(self.step_of(i))
        self._log_choice()
        choice = evaluation.choice
        branches = tuple(dict.fromkeys(branch for i, term in self.terms if self.covers(i) for branch in term.branches))
        evaluation.branches = branches if choice.terms else ()
        self.count_saved(len(branches), choice.terms)
        return evaluation

    def narrow(self, index: int, choice: Choice | None) -> None:
        """Narrow the current evaluation by what policy number ``index`` has seen in it."""
        if choice is not None:
            self.evaluation.choices[index] &= choice
            self._log_choice()

    def leave_out_at_weight_1(self) -> None:
        """Where a policy wants weight 1 and the guider has a weight of its own: D_u is D_c, whatever the weight."""
        for index, choice in list(self.evaluation.choices.items()):
            if choice.weight == 1:
                self.narrow(index, Choice(uncond=False))

    def _log_choice(self) -> None:
        if self.evaluation.first:
            self.log.choices[self.evaluation.index] = self.evaluation.choice

    def covers(self, index: int) -> bool:
        """Whether the current solver step starts inside the window of rule number ``index``: sigma_end < sigma <= sigma_start."""
        high, low = self.windows[index]
        return low < self.sigmas[self.evaluation.index] <= high

    def step_of(self, index: int) -> Step:
        """The current step as rule number ``index`` sees it."""
        evaluation, memory = self.evaluation, self.memories.setdefault(index, {})
        return Step(
            evaluation.index, self.sigmas[evaluation.index], evaluation.first, self.layout, memory,
            covered=self.covers(index), flow=self.flow, reads_uncond=self.reads_uncond, record=self.record, point=evaluation.point,
            next_sigma=self.sigmas[evaluation.index + 1], steps=self.log.steps, spend=self.spend,
        )  # fmt: skip

    # --- counters and curves ---

    def count(self, rows: int, chunks: float) -> None:
        """One model call of ``rows`` rows that holds ``chunks`` branches, or parts of them. Several GPUs call from a thread each."""
        step = self.evaluation.index
        with self._counting:
            self.log.calls += 1
            self.log.rows += rows
            self.log.nfe += chunks
            self.log.evaluations[step] = self.log.evaluations.get(step, 0) + chunks

    def count_saved(self, branches: int, rows: Rows) -> None:
        """Branches of which only these rows are evaluated."""
        self.log.saved += branches * (1 - (float(rows) if isinstance(rows, bool) else sum(rows) / len(rows)))

    def note_shares(self, branches: Sequence[Branch | None], shares: Sequence[float], whose: str) -> None:
        """What was computed for each chunk of a forward pass, as a share of an evaluation. whose: who keeps chunks from sharing more."""
        of_branch = {branch: share for branch, share in zip(branches, shares, strict=False) if branch is not None}
        step = self.evaluation.index
        with self._counting:
            self.log.unshared = self.log.unshared or whose
            for (_, term), name in zip(self.terms, self.labels, strict=True):
                for share in (of_branch[branch] for branch in term.branches if branch in of_branch):
                    self.log.shares.setdefault(name, {}).setdefault(step, share)

    def spend(self, name: str, rows: int) -> None:
        """Count what a rule spends besides evaluations, such as a decode, for this many rows."""
        self.log.spent[name] = self.log.spent.get(name, 0) + rows / self.log.batch

    def record(self, quantity: Quantity, values: Tensor) -> None:
        """Keep a curve's value [B] for this step; it stays on the device until the run ends."""
        if self.evaluation.first:
            self._curves.record(quantity, self.evaluation.index, values.detach().float().mean())

    def record_predictions(self, cond: Tensor | None, uncond: Tensor | None) -> None:
        """Curves of the sampler's own predictions, where both were evaluated."""
        if cond is None or uncond is None or not self.evaluation.first:
            return
        guided = self.evaluation.choice.uncond
        if isinstance(guided, tuple):
            rows = on_device_of(cond, [i for i, is_guided in enumerate(guided) if is_guided])
            cond, uncond = cond[rows], uncond[rows]
        self.record(CFG_UPDATE, norm_per_sample(cond - uncond, self.layout) / norm_per_sample(cond, self.layout))
        self.record(COSINE, cosine_per_sample(cond, uncond, self.layout))

    def record_update(self, index: int, before: Tensor, after: Tensor) -> None:
        """Curve of what rule number ``index`` changed, relative to the denoised image."""
        if self.evaluation.first:
            self.record(self.updates[index], norm_per_sample(after - before, self.layout) / norm_per_sample(before, self.layout))

    def log_so_far(self) -> RunLog:
        """The log with what the device has handed over of the curves; does not wait for it."""
        self._curves.collect_ready()
        self._note_policies()
        return self.log

    def finish(self) -> None:
        """Bring the curves to the CPU and publish the log under the plan."""
        self.log.seconds = time.perf_counter() - self._began
        self.evaluation.point = None  # it knows the run: without this, both would live on until Python looks for circles
        self._curves.read()
        self._note_policies()
        publish(self.plan, self.log)
        if self.watcher is not None:
            self.watcher.finished(self)

    def _note_policies(self) -> None:
        for index, policy in self.policies:
            policy.note(self.memories.get(index, {}), self.log)


def _numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number after those that are there several times."""
    return [name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}" for i, name in enumerate(names)]


def run_of(model_options: Mapping[str, Any]) -> Run | None:
    """The run that a sampling call's options carry."""
    return model_options.get("transformer_options", {}).get(RUN)


@contextmanager
def announcing_steps(model_options: Mapping[str, Any], sigmas: Tensor) -> Iterator[Callable[[int], None]]:
    """For a sampler of this pack, around its loop over ``sigmas``: what it calls with the index of each step that it begins.

    Nothing happens without a run, and where another pack has cut the run's schedule up, so that the sampler goes along a part of it.
    """
    run = run_of(model_options)
    if run is None or len(sigmas) != len(run.sigmas):
        yield lambda index: None
        return
    run.memories.clear()  # where the loop starts again, on the next part of a video
    with run.position.announced() as at_step:
        yield at_step
