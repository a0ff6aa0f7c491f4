"""Several models sampled one after the other with the same noise and settings, as KSampler does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .engine.attach import attach
from .engine.checks import check_start
from .engine.host import describe_latent, same_latent, with_all_channels
from .engine.keys import TIMER
from .engine.log import last_log
from .engine.plan import Rule, plan_of
from .engine.start import Start

NAME = "Compare Guidance"


@dataclass(frozen=True)
class NamedModel:
    """A model, and what messages call it."""

    name: str
    model: Any


@dataclass(frozen=True)
class Sampled:
    """What came out of one model. seconds: of the sampler's steps alone, without loading the model."""

    samples: Tensor
    nfe: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What all models have in common: KSampler's inputs, with its meaning."""

    positive: list
    negative: list
    latent: dict[str, Any]
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float = 1.0

    @property
    def settings(self) -> str:
        """The numbers in one line, for people."""
        solver = f"{self.steps} steps of {self.sampler_name} ({self.scheduler})"
        return f"seed {self.seed}, {solver}, cfg {self.cfg:g}, denoise {self.denoise:g}"

    def run(self, models: Sequence[NamedModel]) -> list[Sampled]:
        """Sample every model. Raises ValueError naming the one that is refused; most refusals come before anything is sampled."""
        for named in models:
            _naming(named, self._check, named.model, models[0])
        return [_naming(named, self._sample, named.model, index, len(models)) for index, named in enumerate(models)]

    def _check(self, model: Any, first: NamedModel) -> None:
        """What the engine refuses when a run starts, asked before the first run of all."""
        _check_latent(model, first)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(self.cfg)
        plan = plan_of(model.model_options)
        if plan is None:
            return
        sampler = comfy.samplers.sampler_object(self.sampler_name)
        samples = self._samples(model)
        check_start(plan, Start(guider, sampler, self._sigmas(model), None if samples.is_nested else samples.shape))

    def _sigmas(self, model: Any) -> Tensor:
        """The schedule [T + 1] that KSampler would use."""
        sampler = comfy.samplers.KSampler(
            model, self.steps, model.load_device, self.sampler_name, self.scheduler, self.denoise, model_options=model.model_options
        )
        return sampler.sigmas

    def _samples(self, model: Any) -> Tensor:
        """The latent that sampling starts from [B, C, ...]."""
        return with_all_channels(model, self.latent)

    def _sample(self, model: Any, index: int, count: int) -> Sampled:
        """KSampler's sampling, counted and timed, with its part of the common progress bar."""
        counted = attach(model)
        timer = _Timer()
        counted.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, TIMER, timer)
        samples = self._samples(counted)
        done = comfy.sample.sample(
            counted,
            comfy.sample.prepare_noise(samples, self.seed, self.latent.get("batch_index")),
            self.steps, self.cfg, self.sampler_name, self.scheduler, self.positive, self.negative, samples,
            denoise=self.denoise,
            noise_mask=self.latent.get("noise_mask"),
            callback=_progress(counted, self.steps, index, count),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self.seed,
        )  # fmt: skip
        return Sampled(done, last_log(plan_of(counted.model_options)).nfe, timer.seconds)


def describe(model: Any, cfg: float) -> str:
    """A model's rules and their settings, one a line; what a model is called if the user gives it no name."""
    plan = plan_of(model.model_options)
    rules = [rule for rule in plan.rules if not rule.neutral] if plan is not None else []
    return "\n".join(map(_describe, rules)) or ("CFG" if cfg != 1 else "no guidance")


def _describe(rule: Rule) -> str:
    """The short name of a rule, its numbers, and those words that are not the default."""
    settings = [text for field in fields(rule) if (text := _setting(field, getattr(rule, field.name)))]
    layers = getattr(getattr(rule, "perturbation", None), "layers", ())
    if layers:
        names = (f"{layer.stack}:{layer.block}" + (f".{layer.sub}" if layer.sub else "") for layer in layers)
        settings.append(f"layers {', '.join(names)}")
    return f"{rule.short}: {', '.join(settings)}" if settings else rule.short


def _setting(field: Field, value: Any) -> str:
    if isinstance(value, (str, bool)) or field.name in ("start_percent", "end_percent"):
        return "" if value == field.default else f"{field.name} {value}"
    return f"{field.name} {value:g}" if isinstance(value, (int, float)) else ""


def _check_latent(model: Any, first: NamedModel) -> None:
    """One latent and one VAE cannot serve models with different ones."""
    if not same_latent(model, first.model):
        raise ValueError(
            f"it works on {describe_latent(model)} latents, {first.name} on {describe_latent(first.model)} latents: compare models with "
            "the same kind of latent."
        )


def _naming(named: NamedModel, function: Callable[..., Any], *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"{NAME}: {named.name}: {error}") from error


def _progress(model: Any, steps: int, index: int, count: int) -> Callable[[int, Tensor, Tensor, int], None]:
    """The sampler's callback for one model: the host's previews, and one bar over all models' steps."""
    callback = latent_preview.prepare_callback(model, steps * count)
    return lambda step, x0, x, _: callback(index * steps + min(step, steps - 1), x0, x, steps * count)


class _Timer:
    """A wrapper around the sampler that takes the time."""

    seconds = 0.0

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        began = time.perf_counter()
        samples = executor(*args, **kwargs)
        samples.flatten()[:1].tolist()  # waits for the device
        self.seconds = time.perf_counter() - began
        return samples
