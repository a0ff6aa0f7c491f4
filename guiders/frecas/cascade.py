"""FreCaS: the cascade. Zhang, Li, Zhang, ICLR 2025, arXiv 2410.18410, section 3 (read in the authors' main.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..engine.attach import attach
from ..engine.checks import refuse_lambda
from ..engine.host import reads_uncond, with_all_channels
from ..engine.keys import TELEMETRY
from ..engine.log import RunLog, joined, last_log, publish
from ..engine.plan import plan_of
from ..engine.telemetry import of_cascade
from ..shapers.frequency import FrequencyGuidance
from .levels import first_sigmas, next_sigmas
from .map_patches import with_maps
from .maps import Maps
from .stages import NAME, Stage, gamma_of, ratio, read_stages
from .transition import StageStart, decode, empty_latent, encode, first_start, next_start, rescale_conditioning, resize
from .windows import check_network, with_windows

_OWN_LEVELS = ("dpm_fast", "dpm_adaptive")  # the host's samplers that take only the ends of a schedule


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Parameters of one cascade.

    cfg: the first stage's weight and w_l of the others. gamma: below 0 for the authors'. high_scale: w_h. map_weight: w_c.
    resize: one of transition.RESIZES. node: the node of the graph that runs it, if any.
    """

    model: Any
    vae: Any
    stages: Sequence[Stage]
    cfg: float
    sampler: str
    scheduler: str
    gamma: float
    high_scale: float
    map_weight: float
    resize: str = "nearest"
    node: str | None = None

    @classmethod
    def read(cls, stages: str, *, model: Any, vae: Any, **parameters: Any) -> Cascade:
        """A cascade of the stages that a text stands for."""
        return cls(model=model, vae=vae, stages=read_stages(stages, model, vae.spacial_compression_encode()), **parameters)

    def latent(self, given: dict[str, Any] | None, batch: int) -> dict[str, Any]:
        """What the first stage starts from: what the user gave, else an empty latent."""
        if given is None:
            return {"samples": empty_latent(self.model, self.vae, self.stages[0], batch)}
        return given | {"samples": with_all_channels(self.model, given)}

    def sample(self, positive: list, negative: list, seed: int, latent: dict[str, Any]) -> list[dict[str, Tensor]]:
        """The clean LATENT of every stage, the last one being the result.

        latent: what the first stage starts from, of any size (zeros for nothing). All stages keep to its ``noise_mask``.
        """
        self._check(latent)
        maps = [Maps() for _ in self.stages]
        models, schedules = self._models(maps), self.schedules()
        known = _Known(self.vae, latent, self.resize)
        preview = _Preview(self.model, [stage.steps for stage in self.stages])
        results: list[Tensor] = []
        logs: list[RunLog] = []
        try:
            for index, (model, sigmas) in enumerate(zip(models, schedules, strict=True)):
                start = self._start(index, known, results, sigmas, seed)
                final = self._sampled(self._guider(index, model, positive, negative), start, known, preview.of(index))
                logs.append(last_log(plan_of(model.model_options)))  # stages may share a plan
                last = index == len(self.stages) - 1  # in all others the solver's last update is discarded
                results.append(_between_nodes(final if last else model.model.process_latent_out(preview.denoised.cpu())))
                if index:
                    maps[index - 1].clear()
        finally:  # the host may hold on to a stage's model
            for stage_maps in maps:
                stage_maps.clear()
        plan = plan_of(self.model.model_options)
        if plan is not None:
            publish(plan, joined(logs))
        return [{"samples": result} for result in results]

    def _check(self, latent: dict[str, Any]) -> None:
        """Raise ValueError, before anything is evaluated, for a latent, a sampler or a network with which stages cannot work."""
        if latent["samples"].is_nested:
            raise ValueError(f"{NAME} works on pictures and videos; this latent packs several parts.")
        if self.sampler in _OWN_LEVELS and len(self.stages) > 1:
            raise ValueError(
                f"{NAME} and the sampler {self.sampler} do not go together: it chooses its noise levels itself and never evaluates the one "
                "at which a stage ends; use another sampler, such as dpmpp_2m."
            )
        if any(stage.windows != (1, 1) for stage in self.stages):
            check_network(self.model)

    def _start(self, index: int, known: _Known, results: Sequence[Tensor], sigmas: Tensor, seed: int) -> StageStart:
        """A stage before it is sampled, given the results of those before it."""
        stage = self.stages[index]
        if index == 0:
            return first_start(known.at(stage), sigmas, seed)
        paste = None if known.mask is None else partial(known.outside, stage=stage)
        return next_start(self.model, self.vae, stage, index, results[-1], sigmas, seed, self.resize, known.batch_index, paste)

    def _sampled(self, guider: Any, start: StageStart, known: _Known, callback: Callable) -> Tensor:
        """What the sampler makes of a stage [B, C, ...]."""
        solver, quiet = comfy.samplers.sampler_object(self.sampler), not comfy.utils.PROGRESS_BAR_ENABLED
        noise = start.noise(known.batch_index)
        return guider.sample(noise, start.latent, solver, start.sigmas, known.mask, callback, quiet, start.seed)

    def _guider(self, index: int, model: Any, positive: list, negative: list) -> Any:
        """The host's guider with the conditioning at a stage's size."""
        stage, first = self.stages[index], self.stages[0]
        guider = comfy.samplers.CFGGuider(model)
        scale = stage.height / first.height, stage.width / first.width
        guider.set_conds(*(rescale_conditioning(conditioning, *scale) for conditioning in (positive, negative)))
        guider.set_cfg(self.cfg)
        return guider

    def schedules(self) -> list[Tensor]:
        """The levels of every stage; ValueError if they do not fit together."""
        schedules = [first_sigmas(self.model, self.scheduler, self.stages[0])]
        gamma = gamma_of(self.model, len(self.stages), self.gamma)
        for small, large in pairwise(self.stages):
            schedules.append(next_sigmas(self.model, self.scheduler, schedules[-1], ratio(small, large), gamma, large))
        return schedules

    def _models(self, maps: Sequence[Maps]) -> list[Any]:
        """The model of every stage, with one telemetry for all."""
        models = [self._guided(index, maps) for index in range(len(self.stages))]
        watch = of_cascade(self.node, self.stages)
        for model in models if watch is not None else ():
            model.model_options["transformer_options"][TELEMETRY] = watch
        return models

    def _guided(self, index: int, maps: Sequence[Maps]) -> Any:
        """The model of a stage: its windows, FA-CFG, and the maps of the stage before; maps are collected but in the last stage."""
        model = with_windows(attach(self.model), *self.stages[index].windows)
        if index and self.cfg not in (1, self.high_scale):  # at cfg 1 there is no D_u
            refuse_lambda(f"{NAME} (high_scale)", reads_uncond(comfy.samplers.sampler_object(self.sampler)), "set high_scale to cfg")
            small = self.stages[index - 1]
            pixels = self.vae.spacial_compression_encode()
            size = {"low_height": small.height // pixels, "low_width": small.width // pixels}
            model = attach(model, FrequencyGuidance(low_scale=self.cfg, high_scale=self.high_scale, **size))
        collect = maps[index] if index < len(self.stages) - 1 else None
        first, stage = self.stages[0], self.stages[index]
        area = stage.width * stage.height / (first.width * first.height)
        return with_maps(model, self.map_weight, maps[index - 1] if index else None, collect, area)


def _between_nodes(latent: Tensor) -> Tensor:
    """A latent on the device and in the dtype in which the host keeps it between nodes."""
    return latent.to(device=comfy.model_management.intermediate_device(), dtype=torch.float32)


class _Known:
    """The latent the user came with, at the size of any stage, and the mask of what is to be made anew."""

    def __init__(self, vae: Any, latent: dict[str, Any], method: str) -> None:
        self.vae, self.method = vae, method
        self.latent, self.mask, self.batch_index = latent["samples"], latent.get("noise_mask"), latent.get("batch_index")
        self.pixels: Tensor | None = None

    def at(self, stage: Stage) -> Tensor:
        """The latent [B, C, ...] at a stage's size, from its pixels."""
        factor = self.vae.spacial_compression_encode()
        size = stage.height // factor, stage.width // factor
        if tuple(self.latent.shape[-2:]) == size:
            return self.latent
        if torch.count_nonzero(self.latent) == 0:
            return self.latent.new_zeros(*self.latent.shape[:-2], *size)
        if self.pixels is None:
            self.pixels = decode(self.vae, self.latent)
        return encode(self.vae, resize(self.pixels, stage.width, stage.height, self.method))

    def outside(self, clean: Tensor, stage: Stage) -> Tensor:
        """``clean`` inside the mask, what is known outside."""
        mask = comfy.sampler_helpers.prepare_mask(self.mask, clean.shape, clean.device)
        return clean * mask + self.at(stage) * (1 - mask)


class _Preview:
    """One progress bar over all stages with the host's previews; keeps the last clean estimate."""

    def __init__(self, model: Any, steps: Sequence[int]) -> None:
        self.steps = steps
        self.output: dict[str, Tensor] = {}
        self.callback = latent_preview.prepare_callback(model, sum(steps), self.output)

    @property
    def denoised(self) -> Tensor:
        """What the last evaluation took for the clean latent [B, C, ...], as the model scales it."""
        return self.output["x0"]

    def of(self, index: int) -> Callable[[int, Tensor, Tensor, int], None]:
        """The sampler's callback in one stage."""
        done = sum(self.steps[:index])
        return lambda step, x0, x, _: self.callback(done + min(step, self.steps[index] - 1), x0, x, sum(self.steps))
