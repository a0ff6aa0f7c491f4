"""Builds a ``Graph`` out of the host's nodes and samples it, by node ids alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lodestar.benchmarks._tiny import TinyVAE, call
from lodestar.benchmarks.fuzz import material
from lodestar.benchmarks.fuzz.choices import EMPTY, FIT, OURS, POLICY, WEAK, Graph, Piece


@dataclass(frozen=True)
class Built:
    """model: with the chain on it. sample: gives all latents of a run."""

    model: Any
    sample: Callable[[], list[Tensor]]


def build(graph: Graph) -> Built:
    """The graph's MODEL and a function that samples it. Raises what a node raises."""
    frames = graph.latent.get("frames", 1)
    positive = _prompt(graph, 1, graph.positive)
    negative = _prompt(graph, 2, graph.negative)
    for name, inputs in graph.positive:
        if name == "control":
            positive, negative = _controlled(positive, negative, inputs)
    latent = _latent(graph, frames)
    base = material.model(graph.kind)
    model = base
    for name, inputs in graph.chain:
        if name == "lora":
            model = material.with_patch(model, inputs["seed"])
        elif name == "deepcopy":
            model = material.with_copied_options(model)
        else:
            model = call(name, model=model, **{key: _resolved(value, graph, latent, model) for key, value in inputs.items()})[0]
    name, inputs = graph.sampling

    def sample() -> list[Tensor]:
        torch.manual_seed(graph.seed)  # some nodes of the host draw from it, and not all samplers set it
        return SAMPLING[name](model, positive, negative, latent, **inputs)

    return Built(model, sample)


def without_us(graph: Graph) -> Graph:
    """The same graph without our nodes on the MODEL."""
    return replace(graph, chain=tuple(piece for piece in graph.chain if not piece[0].startswith(OURS)))


def plain(graph: Graph) -> Graph:
    """The same graph without any node of ours, sampled by the host's nodes."""
    graph = without_us(graph)
    name, inputs = graph.sampling
    kept = {key: inputs[key] for key in ("sampler_name", "scheduler", "steps", "cfg", "seed", "denoise") if key in inputs}
    if "lambda_" in inputs:  # nodes of the host see it as the cfg
        kept["cfg"] = inputs["lambda_"]
    if name in ("cfgpp", "invert", "frecas", "compare"):
        return replace(graph, sampling=("KSampler", kept if name == "compare" else {**kept, "sampler_name": "euler"}))
    return graph


def _resolved(value: Any, graph: Graph, latent: dict[str, Any], model: Any) -> Any:
    if value == WEAK:
        return material.model(graph.kind, 7)
    if value == EMPTY:
        return material.prompt(graph.kind, 6, graph.latent.get("frames", 1))
    if value in (FIT, POLICY):
        return _learned(graph, latent, model)[value]()
    return value


def _learned(graph: Graph, latent: dict[str, Any], model: Any) -> dict[str, Callable[[], Any]]:
    """What a fit or a search finds for the graph's sampler and schedule on the model as it is so far."""
    inputs, frames = graph.sampling[1], graph.latent.get("frames", 1)
    empty = {"samples": torch.zeros_like(latent["samples"])}
    common = {
        "model": [model], "positive": [material.prompt(graph.kind, 1, frames)], "negative": [material.prompt(graph.kind, 2, frames)],
        "latent_image": [empty], "sampler": [_sampler(inputs["sampler_name"])], "cfg": [inputs["cfg"]], "seed": [1],
        "sigmas": [_sigmas(model, inputs["scheduler"], inputs["steps"], inputs.get("denoise", 1.0))],
    }  # fmt: skip
    return {
        FIT: lambda: call("LodestarLinearAGFit", trajectories=[2], **common)[0],
        POLICY: lambda: call("LodestarPolicySearch", iterations=[1], cost_weight=[0.5], **common)[0],
    }


# --- prompts, latents ------------------------------------------------------------------------------------------------


def _prompt(graph: Graph, seed: int, changes: tuple[Piece, ...]) -> list:
    kind, frames = graph.kind, graph.latent.get("frames", 1)
    conditioning = material.prompt(kind, seed, frames)
    for name, inputs in changes:
        values = dict(inputs)
        other = material.prompt(kind, values.pop("seed", 0), frames)
        conditioning = _changed(name, conditioning, other, values, graph)
    return conditioning


def _changed(name: str, first: list, other: list, values: dict[str, Any], graph: Graph) -> list:
    if name == "area":
        return first + call("ConditioningSetArea", conditioning=other, **values)[0]
    if name == "percentage":
        return first + call("ConditioningSetAreaPercentage", conditioning=other, **values)[0]
    if name == "mask":
        return first + call("ConditioningSetMask", conditioning=other, mask=mask("half", graph), **values)[0]
    if name == "times":
        early = call("ConditioningSetTimestepRange", conditioning=first, start=0.0, end=values["at"])[0]
        return early + call("ConditioningSetTimestepRange", conditioning=other, start=values["at"], end=1.0)[0]
    if name == "window":
        return call("ConditioningSetTimestepRange", conditioning=first, **values)[0]
    if name == "combine":
        return call("ConditioningCombine", conditioning_1=first, conditioning_2=other)[0]
    if name == "concat":
        return call("ConditioningConcat", conditioning_to=first, conditioning_from=other)[0]
    if name == "average":
        return call("ConditioningAverage", conditioning_to=first, conditioning_from=other, conditioning_to_strength=0.6)[0]
    if name == "zero":
        return call("ConditioningZeroOut", conditioning=first)[0]
    if name == "hooks":
        return material.hooked(first, material.model(graph.kind), 5)
    if name == "gligen":
        return material.with_boxes(first, material.model(graph.kind))
    if name == "flux_guidance":
        return call("FluxGuidance", conditioning=first, **values)[0]
    return first  # "control" changes both prompts at once


def _controlled(positive: list, negative: list, inputs: dict[str, Any]) -> tuple[list, list]:
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))
    return call(
        "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=material.control_net(), image=picture, **inputs
    )


def _latent(graph: Graph, frames: int) -> dict[str, Any]:
    about = graph.latent
    samples = material.empty_latent(graph.kind, about["batch"], about["height"], about["width"], frames)
    if about.get("filled"):
        samples = torch.randn(samples.shape, generator=torch.Generator().manual_seed(9))
        samples *= 0.5 * 2.0 ** torch.arange(len(samples)).view(-1, *[1] * (samples.ndim - 1))  # images that are not alike
    latent: dict[str, Any] = {"samples": samples}
    if "mask" in about:
        (latent,) = call("SetLatentNoiseMask", samples=latent, mask=mask(about["mask"], graph))
    if about.get("batch_index"):
        latent["batch_index"] = list(range(3, 3 + about["batch"]))
    return latent


def mask(name: str, graph: Graph) -> Tensor:
    """A MASK in pixels: ones, its left half, a slope, or another part for each image."""
    height, width, batch = graph.latent["height"] * 8, graph.latent["width"] * 8, graph.latent["batch"]
    slope = torch.linspace(0, 1, width).expand(1, height, width)
    if name == "each":
        return torch.cat([(slope > i / (batch + 1)).float() for i in range(batch)])
    return {"ones": torch.ones(1, height, width), "half": (slope < 0.5).float(), "soft": slope.clone()}[name]


# --- sampling --------------------------------------------------------------------------------------------------------


@cache
def _sampler(name: str) -> Any:
    if name == "SamplerLCMUpscale":
        return call(name, scale_ratio=1.5)[0]
    return call(name)[0] if name.startswith("Sampler") else call("KSamplerSelect", sampler_name=name)[0]


def _sigmas(model: Any, scheduler: str, steps: int, denoise: float = 1.0) -> Tensor:
    return call("BasicScheduler", model=model, scheduler=scheduler, steps=steps, denoise=denoise)[0]


def _ksampler(model: Any, positive: list, negative: list, latent: dict, **inputs: Any) -> list[Tensor]:
    return [call("KSampler", model=model, positive=positive, negative=negative, latent_image=latent, **inputs)[0]["samples"]]


def _advanced(model: Any, positive: list, negative: list, latent: dict, seed: int, **inputs: Any) -> list[Tensor]:
    out = call(
        "KSamplerAdvanced", model=model, positive=positive, negative=negative, latent_image=latent, noise_seed=seed, add_noise="enable",
        return_with_leftover_noise="enable", **inputs,
    )  # fmt: skip
    return [out[0]["samples"]]


def _guider(
    model: Any, positive: list, negative: list, latent: dict, sampler_name: str, scheduler: str, steps: int, cfg: float, seed: int,
    guider: str, split: bool,
) -> list[Tensor]:  # fmt: skip
    inputs = {
        "CFGGuider": {"positive": positive, "negative": negative, "cfg": cfg},
        "DualCFGGuider": {
            "cond1": positive,
            "cond2": negative,
            "negative": negative,
            "cfg_conds": cfg,
            "cfg_cond2_negative": 2.0 if cfg != 1 else 1.0,
        },
        "BasicGuider": {"conditioning": positive},
        "PerpNegGuider": {"positive": positive, "negative": negative, "empty_conditioning": negative, "cfg": cfg, "neg_scale": 1.0},
    }[guider]
    (made,) = call(guider, model=model, **inputs)
    sigmas = _sigmas(model, scheduler, steps)
    results: list[Tensor] = []
    for part in call("SplitSigmas", sigmas=sigmas, step=1) if split else [sigmas]:
        (noise,) = call("DisableNoise") if results else call("RandomNoise", noise_seed=seed)
        out = call(
            "SamplerCustomAdvanced", noise=noise, guider=made, sampler=_sampler(sampler_name), sigmas=part,
            latent_image={**latent, "samples": results[0]} if results else latent,
        )  # fmt: skip
        results += [one["samples"] for one in out]
    return results


def _cfgpp(
    model: Any, positive: list, negative: list, latent: dict, scheduler: str, steps: int, seed: int, solver: str, lambda_: float,
    history: str, repeated: bool, **_: Any,
) -> list[Tensor]:  # fmt: skip
    sigmas = _sigmas(model, scheduler, steps)
    if repeated:  # as some schedulers of other packs make them
        sigmas = torch.cat((sigmas[:2], sigmas[1:]))
    (sampler,) = call("LodestarCFGPP", sampler=solver, lambda_=lambda_, history=history)
    out = call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=seed, cfg=1.0, positive=positive, negative=negative, sampler=sampler,
        sigmas=sigmas, latent_image=latent,
    )  # fmt: skip
    return [one["samples"] for one in out]


def _inverted(
    model: Any, positive: list, negative: list, latent: dict, scheduler: str, steps: int, lambda_: float, **more: Any
) -> list[Tensor]:
    noise, sigmas = call(
        "LodestarCFGPPInvert", model=model, positive=positive, negative=negative, latent_image=latent, lambda_=lambda_,
        sigmas=_sigmas(model, scheduler, steps),
    )  # fmt: skip
    return [noise["samples"], sigmas]


def _cascade(
    model: Any, positive: list, negative: list, latent: dict, sampler_name: str, steps: int, third: bool, **inputs: Any
) -> list[Tensor]:
    flow = type(model.model.model_sampling).__mro__[1].__name__.endswith("Flow") or float(model.model.model_sampling.sigma_max) <= 1
    end = 0.4 if flow else 0.9
    stages = f"64x64: {steps} steps, end {end}; 128x96: 2 steps" + (f", end {end}; 128x128: 2 steps" if third else "")
    vae = TinyVAE(model.model.latent_format.latent_channels)
    last, every = call(
        "LodestarFreCaS", model=model, positive=positive, negative=negative, vae=vae, stages=stages, sampler=sampler_name,
        batch_size=len(latent["samples"]), **inputs, **({"latent": latent} if "noise_mask" in latent else {}),
    )  # fmt: skip
    return [last["samples"], *(one["samples"] for one in every)]


def _compared(model: Any, positive: list, negative: list, latent: dict, **inputs: Any) -> list[Tensor]:
    vae = TinyVAE(model.model.latent_format.latent_channels)
    call("LodestarCompare", models={"model0": model}, positive=positive, negative=negative, latent_image=latent, vae=vae, **inputs)
    return []  # its picture shows seconds


SAMPLING = {
    "KSampler": _ksampler, "KSamplerAdvanced": _advanced, "guider": _guider, "cfgpp": _cfgpp, "invert": _inverted, "frecas": _cascade,
    "compare": _compared,
}  # fmt: skip
