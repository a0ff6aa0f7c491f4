"""Fitting LinearAG to CFG trajectories, of which only their inner products are kept. Castillo et al., AAAI 2025, arXiv 2312.12487.

Every step is regressed on what CFG evaluated. While sampling, predictions of earlier steps take the place of some of that. Fitting each
step on runs that already use the steps before it needs new trajectories for every step, and gained little (see the help page).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import comfy.model_management
import torch
from torch import Tensor

from ...engine.attach import attach
from ...engine.choice import Choice
from ...engine.curves import Quantity
from ...engine.host import has_frames_for_rows
from ...engine.plan import Policy
from ...engine.step import Step
from ...engine.telemetry import tracing
from ...learning.progress import Progress
from ...learning.recognition import setting_of
from ...learning.runs import Runs
from .coefficients import Coefficients
from .regression import Gram, score

NAME = "LinearAG: fit"
RESIDUAL = Quantity("1 - R² of the predicted unconditional prediction", "residual")
LEAST_STEPS = 4  # the first schedule with a step to replace


class Trajectory:
    """The scores of one run, in the order of its steps."""

    def __init__(self, progress: Progress, pictures: str) -> None:
        self.cond: list[Tensor] = []
        self.uncond: list[Tensor] = []
        self.progress, self.pictures = progress, pictures

    def add(self, cond: Tensor, uncond: Tensor) -> None:
        """Keep the scores of the next step. Raises ValueError where the latent's size is not that of the steps before."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.cond and self.cond[0].shape != cond.shape:
            raise ValueError(f"{NAME} cannot work with a sampler that changes the latent's size between steps; use another sampler.")
        self.cond.append(cond)
        self.uncond.append(uncond)
        self.progress.update(self.pictures)


@dataclass(frozen=True, kw_only=True)
class Recorder(Policy):
    """Hands the scores of plain CFG to a trajectory."""

    name: ClassVar[str] = NAME
    short: ClassVar[str] = "LinearAG"
    trajectory: Trajectory

    @property
    def neutral(self) -> bool:
        """Never."""
        return False

    def choose(self, step: Step) -> Choice:
        """Plain CFG."""
        return Choice()

    def observe(self, cond: Tensor | None, uncond: Tensor | None, x: Tensor, sigma: Tensor, step: Step) -> None:
        """Once per step. Raises ValueError in the first step of a sampler that evaluates more often, and where a prediction is left out."""
        if cond is None or uncond is None:
            raise ValueError(f"{NAME} needs both predictions in every step; bypass the node on its model that leaves one out.")
        if not step.first:
            raise ValueError(f"{NAME} needs a sampler that evaluates the model once per step, such as euler, dpmpp_2m or ddim.")
        self.trajectory.add(score(x, cond, sigma), score(x, uncond, sigma))


def fit(runs: Runs, trajectories: int, node: str | None = None, write: Callable[[str], None] | None = None) -> Coefficients:
    """Sample ``trajectories`` images or videos with CFG, as many at a time as the latent has, and solve.

    node: that of the graph. write: gets a line of text now and then, which says how far it is.

    Raises ValueError as ``Runs.check`` does, and for samplers of several evaluations per step.
    """
    runs.check(LEAST_STEPS)
    steps = len(runs.sigmas) - 1
    gram = Gram(steps)
    one_video = has_frames_for_rows(runs.model)  # which the latent's rows are then
    batch = 1 if one_video else len(runs.latent["samples"])
    count = -(-trajectories // batch)
    progress = Progress(steps * count, write)
    with tracing(node, RESIDUAL, count, "run") as trace:
        for number in range(count):
            last = min(gram.trajectories + batch, trajectories)
            trajectory = Trajectory(progress, f"{last} of {trajectories} pictures")
            guider = runs.guider(number, attach(runs.model, Recorder(trajectory=trajectory)))
            runs.sample(guider, number, runs.sampler, None if one_video else trajectories - gram.trajectories)
            gram.add(*([one[None] for one in scores] if one_video else scores for scores in (trajectory.cond, trajectory.uncond)))
            if trace is not None:
                trace.add(number, gram.residual())
    if not torch.isfinite(gram.matrix).all():
        raise ValueError(f"{NAME}: the model's predictions are not finite with these settings.")
    return Coefficients.of(gram, setting_of(guider, runs.sampler, runs.sigmas))
