"""FreCaS: the cascade. Zhang, Li, Zhang, ICLR 2025, arXiv 2410.18410, section 3 (read in the authors' main.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..engine.attach import attach
from ..engine.keys import TELEMETRY
from ..engine.log import joined, last_log, publish
from ..engine.plan import plan_of
from ..engine.telemetry import of_cascade
from ..shapers.frequency import FrequencyGuidance
from .levels import shift_level, stage_sigmas
from .maps import Maps, with_maps
from .stages import NAME, Stage, check_size, preset_of, ratio, read_stages, size_multiple
from .transition import decode, encode, enlarge, renoise, rescale_conditioning, resize, stage_noise, stage_seed


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
        return given | {"samples": comfy.sample.fix_empty_latent_channels(self.model, given["samples"])}

    def sample(self, positive: list, negative: list, seed: int, latent: dict[str, Any]) -> list[dict[str, Tensor]]:
        """The clean LATENT of every stage, the last one being the result.

        latent: what the first stage starts from, of any size (zeros for nothing). All stages keep to its ``noise_mask``.
        """
        if latent["samples"].is_nested:
            raise ValueError(f"{NAME} works on pictures and videos; this latent packs several parts.")
        maps = [Maps() for _ in self.stages]
        models = [self._guided(index, maps) for index in range(len(self.stages))]
        watch = of_cascade(self.node, self.stages)
        for model in models if watch is not None else ():
            model.model_options["transformer_options"][TELEMETRY] = watch
        schedules = self.schedules()
        preview = _Preview(self.model, [stage.steps for stage in self.stages])
        known, results, logs = _Known(self.vae, latent, self.resize), [], []
        try:
            for index, (model, sigmas) in enumerate(zip(models, schedules, strict=True)):
                noise_for = partial(stage_noise, seed=seed, stage=index, batch_index=latent.get("batch_index"))
                clean, noise = self._start(index, known, results, sigmas[0], noise_for)
                guider, solver = self._guider(index, model, positive, negative), comfy.samplers.sampler_object(self.sampler)
                quiet = not comfy.utils.PROGRESS_BAR_ENABLED
                final = guider.sample(noise, clean, solver, sigmas, known.mask, preview.of(index), quiet, stage_seed(seed, index))
                logs.append(last_log(plan_of(model.model_options)))  # stages may share a plan
                last = index == len(self.stages) - 1  # in all others the solver's last update is discarded
                results.append(_on_hand(final if last else model.model.process_latent_out(preview.denoised.cpu())))
                if index:
                    maps[index - 1].clear()
        finally:  # the host may hold on to a stage's model
            for stage_maps in maps:
                stage_maps.clear()
        plan = plan_of(self.model.model_options)
        if plan is not None:
            publish(plan, joined(logs))
        return [{"samples": result} for result in results]

    def _start(
        self, index: int, known: _Known, results: Sequence[Tensor], sigma: Tensor, noise_for: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The latent [B, C, ...] that a stage starts from and the noise that the host's sampler adds to it."""
        stage = self.stages[index]
        if index == 0:
            clean = known.at(stage)
            return clean, noise_for(clean)
        clean = enlarge(self.vae, results[-1], stage.width, stage.height, self.resize)
        noise = noise_for(clean)
        if known.mask is not None:  # the host's inpainting wants what is known without noise
            return known.outside(clean, stage), noise
        return renoise(self.model, clean, sigma, noise), torch.zeros_like(noise)

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
        gamma = preset_of(self.model, len(self.stages)).gamma if self.gamma < 0 else self.gamma
        for small, large in pairwise(self.stages):
            schedules.append(next_sigmas(self.model, self.scheduler, schedules[-1], ratio(small, large), gamma, large))
        return schedules

    def _guided(self, index: int, maps: Sequence[Maps]) -> Any:
        """The model of a stage: FA-CFG and the maps of the stage before; maps are collected but in the last stage."""
        model = attach(self.model)
        if index and self.cfg not in (1, self.high_scale):  # at cfg 1 there is no D_u
            small = self.stages[index - 1]
            pixels = self.vae.spacial_compression_encode()
            size = {"low_height": small.height // pixels, "low_width": small.width // pixels}
            model = attach(model, FrequencyGuidance(low_scale=self.cfg, high_scale=self.high_scale, **size))
        collect = maps[index] if index < len(self.stages) - 1 else None
        first, stage = self.stages[0], self.stages[index]
        area = stage.width * stage.height / (first.width * first.height)
        return with_maps(model, self.map_weight, maps[index - 1] if index else None, collect, area)


def first_sigmas(model: Any, scheduler: str, stage: Stage) -> Tensor:
    """The levels of a first stage."""
    sampling = model.get_model_object("model_sampling")
    if stage.end >= float(sampling.sigma_max):
        raise ValueError(
            f"{NAME}: the first stage cannot end at {stage.end:.4g}; the model's highest noise level is {float(sampling.sigma_max):.4g}."
        )
    return stage_sigmas(sampling, scheduler, stage.steps, end=stage.end)


def next_sigmas(model: Any, scheduler: str, before: Tensor, rho: float, gamma: float, stage: Stage) -> Tensor:
    """The levels of a stage after one that was sampled with ``before``, whose last evaluated level is the last but one.

    rho: ratio of the sides. Raises ValueError where level and gamma leave the stage no room.
    """
    sampling = model.get_model_object("model_sampling")
    size, level, top = f"{stage.width}x{stage.height}", float(before[-2]), float(sampling.sigma_max)
    start = shift_level(sampling, level, rho, gamma)
    if start >= top:
        raise ValueError(
            f"{NAME}: the stage before {size} ends at {level:.4g}, which gamma {gamma:g} shifts to {start:.4g}, not below the model's "
            f"highest noise level {top:.4g}; let it end lower."
        )
    if stage.end >= start:
        raise ValueError(f"{NAME}: the stage {size} begins at {start:.4g} and cannot end at {stage.end:.4g}; let it end lower.")
    return stage_sigmas(sampling, scheduler, stage.steps, start, stage.end)


def begin(model: Any, vae: Any, stage: Stage, scheduler: str, seed: int, batch: int) -> tuple[dict[str, Tensor], Tensor, int]:
    """What a sampler needs for a first stage: an empty LATENT, the levels, and the seed of the noise it shall add."""
    check_size(stage.width, stage.height, size_multiple(model, vae.spacial_compression_encode()))
    return {"samples": empty_latent(model, vae, stage, batch)}, first_sigmas(model, scheduler, stage), stage_seed(seed, 0)


def transition(
    model: Any, vae: Any, stage: Stage, scheduler: str, seed: int, number: int, gamma: float, method: str,
    denoised: dict[str, Any] | None, sigmas: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor, int]:  # fmt: skip
    """What a sampler needs for stage ``number``: the noisy LATENT (no noise to add), the levels, and its seed. See Cascade."""
    if denoised is None or sigmas is None:
        raise ValueError("FreCaS Stage Transition: connect both denoised and sigmas, or neither for the first stage.")
    if "noise_mask" in denoised:
        raise ValueError(f"FreCaS Stage Transition cannot keep to a noise mask; use the {NAME} node for that.")
    pixels = vae.spacial_compression_encode()
    check_size(stage.width, stage.height, size_multiple(model, pixels))
    height, width = (side * pixels for side in denoised["samples"].shape[-2:])
    gamma = preset_of(model, 2).gamma if gamma < 0 else gamma
    levels = next_sigmas(model, scheduler, sigmas, ratio(Stage(width, height, 1), stage), gamma, stage)
    clean = enlarge(vae, denoised["samples"], stage.width, stage.height, method)
    noise = stage_noise(clean, seed, number, denoised.get("batch_index"))
    return {"samples": renoise(model, clean, levels[0], noise)}, levels, stage_seed(seed, number)


def empty_latent(model: Any, vae: Any, stage: Stage, batch: int) -> Tensor:
    """Zeros of a stage's size as the model's latent: [batch, C, (1,) h, w]."""
    latent_format, pixels = model.get_model_object("latent_format"), vae.spacial_compression_encode()
    frames = [1] if latent_format.latent_dimensions == 3 else []
    return torch.zeros(batch, latent_format.latent_channels, *frames, stage.height // pixels, stage.width // pixels)


def _on_hand(latent: Tensor) -> Tensor:
    """Where and as the host keeps latents between nodes."""
    return latent.to(device=comfy.model_management.intermediate_device(), dtype=torch.float32)


class _Known:
    """The latent the user came with, at the size of any stage, and the mask of what is to be made anew."""

    def __init__(self, vae: Any, latent: dict[str, Any], method: str) -> None:
        self.vae, self.method = vae, method
        self.latent, self.mask = latent["samples"], latent.get("noise_mask")
        self.pixels: Tensor | None = None

    def at(self, stage: Stage) -> Tensor:
        """The latent [B, C, ...] at a stage's size, from its pixels."""
        ratio_ = self.vae.spacial_compression_encode()
        size = stage.height // ratio_, stage.width // ratio_
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
