"""A resumable training run of one network: what the scripts of the 128-pixel demo models have in common. Needs torch alone."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, safe_open, save_file
from tqdm import tqdm

from workshop.muon import Muon

WARM_UP = 100
SAVE_EVERY = 240  # seconds; a save costs some, as the average is measured
EMA_POWER = 12.0  # power-function average (EDM2, Karras et al. 2024, eq. 4): covers about the last tenth of the run


class Files(NamedTuple):
    """Where a run is kept: all there is to go on (not in the repository), its curve beside that, and the averaged weights."""

    state: Path
    weights: Path

    @property
    def curve(self) -> Path:
        """One line per save: step, seconds, loss, and what the run measures."""
        return self.state.with_suffix(".csv")


class Plan(NamedTuple):
    """Steps of the whole run, peak rates of Muon and Adam, and the parameters that Adam gets beside the vectors."""

    steps: int
    muon: float
    adam: float
    ends: tuple[str, ...]


class Trainer:
    """Trains what of ``net`` requires gradients with ``loss(step)``, a cosine rate and an average of the weights; saves every four minutes.

    measure: figures of the averaged network, for the curve and the metadata of the weights; it may change the network's buffers.
    snapshots: steps at which the averaged weights are written to another file as well.
    Without a saved state the run goes on from the weights in the repository, after a short warm-up.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        loss: Callable[[int], torch.Tensor],
        plan: Plan,
        files: Files,
        measure: Callable[[torch.nn.Module], dict[str, float]] = lambda average: {},
        snapshots: Mapping[int, Path] | None = None,
    ) -> None:
        self.net, self.loss, self.plan, self.files, self.measure, self.snapshots = net, loss, plan, files, measure, snapshots or {}
        self.step, self.since, self.seconds, self.smooth = 0, 0, 0.0, None
        self.net.train()
        trained = [(value, value.ndim > 1 and name not in plan.ends) for name, value in net.named_parameters() if value.requires_grad]
        inner, rest = ([value for value, matrix in trained if matrix is kind] for kind in (True, False))
        self.optimizers = [Muon(inner, plan.muon), torch.optim.Adam(rest, plan.adam, betas=(0.9, 0.99))]
        if files.state.exists():
            self._load_state()
        elif files.weights.exists():
            self._load_weights()
        else:
            self.average = {name: value.clone() for name, value in net.state_dict().items()}

    def _load_state(self) -> None:
        saved = torch.load(self.files.state)
        self.step, self.since, self.seconds, self.average = saved["step"], saved["since"], saved["seconds"], saved["average"]
        self.net.load_state_dict(saved["net"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    def _load_weights(self) -> None:
        self.net.load_state_dict({name: value.float() for name, value in load_file(self.files.weights).items()})
        self.average = {name: value.clone() for name, value in self.net.state_dict().items()}
        with safe_open(self.files.weights, "pt") as file:
            self.step, self.seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
        self.since = self.step

    def run(self) -> None:
        """Train to the last step with a progress bar."""
        saved = time.monotonic()
        with tqdm(total=self.plan.steps, initial=self.step, mininterval=20) as bar:
            while self.step < self.plan.steps:
                began = time.monotonic()
                value = self.train_step()
                self.smooth = value if self.smooth is None else 0.99 * self.smooth + 0.01 * value
                self.seconds += time.monotonic() - began
                bar.update()
                bar.set_postfix(loss=f"{self.smooth:.4f}", refresh=False)
                if self.step in self.snapshots:
                    self.publish(self.snapshots[self.step], {})
                if time.monotonic() - saved > SAVE_EVERY:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def train_step(self) -> float:
        """One update of the weights and of their average. Returns the loss."""
        value = self.loss(self.step)
        value.backward()
        warm = min(1.0, (self.step - self.since + 1) / WARM_UP)
        factor = warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.step / self.plan.steps))))
        for optimizer, rate in zip(self.optimizers, (self.plan.muon, self.plan.adam), strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = (1 - 1 / (self.step - self.since)) ** (EMA_POWER + 1)
        for name, parameter in self.net.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 - keep)
        return value.item()

    def save(self) -> None:
        """Write the state, a line of the curve, and the averaged weights."""
        self.files.state.parent.mkdir(parents=True, exist_ok=True)
        current = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.net.load_state_dict(self.average)
        figures = self.measure(self.net)
        self.average = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.net.load_state_dict(current)
        state = {"step": self.step, "since": self.since, "seconds": self.seconds, "net": current, "average": self.average}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save(state, self.files.state.with_suffix(".partial"))
        self.files.state.with_suffix(".partial").replace(self.files.state)
        line = {"step": self.step, "seconds": round(self.seconds), "loss": round(self.smooth or 0.0, 5)} | figures
        new = not self.files.curve.exists()
        with self.files.curve.open("a", newline="") as file:
            rows = csv.DictWriter(file, line)
            if new:
                rows.writeheader()
            rows.writerow(line)
        self.publish(self.files.weights, figures)

    def publish(self, path: Path, figures: Mapping[str, float]) -> None:
        """Write the averaged weights in half precision, with how far the run is."""
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"step": str(self.step), "seconds": f"{self.seconds:.0f}"} | {name: str(value) for name, value in figures.items()}
        half = {name: value.half().contiguous() for name, value in self.average.items()}
        save_file(half, path.with_suffix(".partial"), metadata)
        path.with_suffix(".partial").replace(path)
