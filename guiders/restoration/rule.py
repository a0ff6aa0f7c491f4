"""Restoration: a measurement of the picture as one more condition. The maths is in decoupled.py and psld.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.branches import Branch
from ..engine.curves import Quantity
from ..engine.host import leaves_out_forward_passes
from ..engine.plan import Term
from ..engine.start import Start
from ..engine.step import Point, Step
from ..spaces import level_of
from . import decoupled, psld
from .codec import Codec, check_memory, check_vae, compression
from .measurement import Measurement
from .model_gradients import estimate_with_gradients

MODES = ("decoupled", "psld")


@dataclass(frozen=True, kw_only=True, eq=False)
class Restoration(Term):
    """D + v, where v moves the clean estimate towards what the measurement says.

    vae: None where the model works on pictures. strength, gluing: omega and gamma of PSLD; decoupled, the weight of the measurement.
    """

    name: ClassVar[str] = "Restoration"
    short: ClassVar[str] = "Restoration"
    measurement: Measurement
    vae: Any = None
    mode: str = "decoupled"
    strength: float = 1.0
    gluing: float = 0.1
    iterations: int = 3

    @property
    def neutral(self) -> bool:
        """Strength 0 does not look at the measurement."""
        return self.strength == 0

    @property
    def models(self) -> tuple[Any, ...]:
        """The VAE, if there is one."""
        return () if self.vae is None else (self.vae.patcher,)

    @property
    def curve(self) -> Quantity:
        """How far the measurement of the estimate is from the one that there is, relative to it, before it is corrected."""
        return Quantity("measurement error", "error")

    def check(self, start: Start) -> None:
        """Refuse latents that are not of the pictures that were measured, and those that are too large for gradients."""
        check_vae(self.name, start.guider.model_patcher.model, self.vae)
        if self.mode == "psld" and leaves_out_forward_passes(start.guider.model_options):
            raise ValueError(
                f"{self.name}: the mode psld needs the gradient of every forward pass, and EasyCache leaves some out; bypass EasyCache, or "
                "choose decoupled."
            )
        if start.shape is None:
            return
        shape, known = tuple(start.shape), len(self.measurement.y)
        if len(shape) != 4 and not (len(shape) == 5 and shape[2] == 1):
            raise ValueError(f"{self.name} works on pictures, and this latent is a video or has sound; use it with a latent of pictures.")
        side = compression(self.vae)
        height, width = shape[-2] * side, shape[-1] * side
        if (height, width) != (self.measurement.height, self.measurement.width):
            raise ValueError(
                f"{self.name}: the measurement is one of a picture of {self.measurement.width}x{self.measurement.height} pixels, and the "
                f"latent makes one of {width}x{height}; use a latent of the measured picture's size."
            )
        if known not in (1, shape[0]):
            raise ValueError(f"{self.name}: there are {known} measurements and {shape[0]} latents; use one measurement, or one for each.")
        check_memory(self.name, self.vae, (shape[0] if self.mode == "psld" else 1, *shape[1:]))

    def add(self, denoised: Tensor, cond: Tensor, others: Mapping[Branch, Tensor], step: Step) -> Tensor:
        """See decoupled.solve and psld.update."""
        point = step.point
        if "y" not in step.memory:
            with torch.inference_mode(False):
                step.memory["y"] = self.measurement.y.to(denoised.device, copy=True)
        codec, y = Codec(point.model, self.vae, step.spend), step.memory["y"]
        return (self._decoupled if self.mode == "decoupled" else self._psld)(denoised, point, step, codec, y)

    def _decoupled(self, denoised: Tensor, point: Point, step: Step, codec: Codec, y: Tensor) -> Tensor:
        """Every evaluation is corrected, at its own noise level."""
        rho = decoupled.precision(self.measurement.noise, self.strength, point.sigma, step.flow)
        with codec.opened():
            start, rho = denoised.detach().float().clone(), rho.clone()
            restored, residual = decoupled.solve(codec.decode, self.measurement.operator, y, start, rho, self.iterations)
        if self.vae is not None:
            step.spend("backward", self.iterations * len(denoised))
        self._record(residual, y, step)
        return restored.to(denoised.dtype)

    def _psld(self, denoised: Tensor, point: Point, step: Step, codec: Codec, y: Tensor) -> Tensor:
        """The gradient is that of the step's first evaluation, and holds for its further stages."""
        if step.first or "update" not in step.memory:
            with codec.opened(), estimate_with_gradients(point) as (x, estimate):
                value, residual = psld.loss(
                    estimate.float(), codec.decode, codec.encode, self.measurement.operator, y, self.strength, self.gluing
                )
                (gradient,) = torch.autograd.grad(value.sum(), x)
            step.spend("backward", len(denoised))
            now, then = (level_of(sigma, step.flow) for sigma in (step.sigma, step.next_sigma))
            step.memory["update"] = psld.update(gradient, value.detach(), now, then, step.steps, not step.reads_uncond)
            self._record(residual, y, step)
        return denoised + step.memory["update"].to(denoised.dtype)

    def _record(self, residual: Tensor, y: Tensor, step: Step) -> None:
        norms = [torch.linalg.vector_norm(x.detach().flatten(1), dim=1) for x in (residual, y)]
        step.record(self.curve, norms[0] / norms[1].clamp_min(1e-12))
