"""Tiny models of the host's own classes, the shortest way to sample them, and the same guidance written without the engine.

Importing this loads the host.
"""

# ruff: noqa: E402
from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from workshop import launching

launching.load_pack()

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.k_diffusion.sampling
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.nested_tensor
import comfy.sample
import comfy.samplers
import comfy.supported_models
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_perpneg as perpneg
import comfyui_version
import node_helpers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

import nodes
from lodestar.guiders.engine.attach import attach
from lodestar.guiders.engine.keys import AROUND
from lodestar.guiders.engine.log import last_log
from lodestar.guiders.engine.plan import Rule, plan_of
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.network.layers import resolve_layers
from lodestar.guiders.shapers.apg import APG, projected_update
from lodestar.guiders.terms.autoguidance import Autoguidance
from lodestar.guiders.terms.pag import PAG

# For tests, which must not import the host before this.
__all__ = ["comfy", "comfyui_version", "custom", "node_helpers", "nodes", "perpneg"]

torch.set_num_threads(1)  # networks this small lose most of their time to threads that wait for each other

KINDS = ("unet", "unet_v", "mmdit")  # eps, v and flow
CONTEXT = 32


class TinyUNet(comfy.supported_models.SD15):
    """The host's UNetModel: two levels and a middle block with attention; eps or v prediction."""

    unet_extra_config: ClassVar = {"num_heads": 4, "num_head_channels": -1}
    prediction = "EPS"

    def model_type(self, state_dict: dict, prefix: str = "") -> Any:
        return comfy.model_base.ModelType[self.prediction]


class TinyUNetV(TinyUNet):
    """The same with v prediction."""

    prediction = "V_PREDICTION"


UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": (1, 2),
    "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 2,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "context_dim": CONTEXT, "legacy": False,
    "adm_in_channels": None, "dtype": torch.float32,
}  # fmt: skip
MMDIT = {
    "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 1, "num_blocks": 3, "num_patches": None,
    "pos_embed_max_size": 64, "pos_embed_scaling_factor": None, "adm_in_channels": CONTEXT, "qk_norm": "rms",
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": 64}},
    "dtype": torch.float32,
}  # fmt: skip


WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "ffn_dim": 64, "freq_dim": 32, "text_dim": CONTEXT, "num_heads": 2,
    "num_layers": 3, "in_dim": 16, "out_dim": 16, "dtype": torch.float32,
}  # fmt: skip
AV = {
    "image_model": "ltxav", "cross_attention_dim": 64, "audio_cross_attention_dim": 64, "attention_head_dim": 32,
    "audio_attention_head_dim": 32, "num_attention_heads": 2, "audio_num_attention_heads": 2, "caption_channels": 64, "num_layers": 2,
    "connector_attention_head_dim": 32, "connector_num_attention_heads": 2, "connector_num_layers": 1, "dtype": torch.float32,
}  # fmt: skip


PIXART = {
    "image_model": "pixart_alpha", "hidden_size": 48, "depth": 3, "num_heads": 2, "caption_channels": CONTEXT, "model_max_length": 5,
    "micro_condition": False, "dtype": torch.float32,
}  # fmt: skip


def fill(network: torch.nn.Module, seed: int = 0) -> None:
    """Random weights for layers that the host leaves uninitialised: unit gain, so that attention and conditioning matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            bound = math.sqrt(3 / parameter[0].numel())
            parameter.data.uniform_(-bound, bound, generator=generator)
        elif name.endswith("bias"):
            parameter.data.uniform_(-0.1, 0.1, generator=generator)
        else:
            parameter.data.fill_(1.0)


def patcher(network: comfy.model_base.BaseModel, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """A filled model in the host's ModelPatcher, on the CPU."""
    fill(network.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(network.eval(), load_device=cpu, offload_device=cpu)


def tiny(kind: str, seed: int = 0, **changes: Any) -> comfy.model_patcher.ModelPatcher:
    """One of KINDS, "wan" (video), "av" (video and audio) or "pixart" (its latents are not square), with random weights.

    ``changes`` go into the network's configuration.
    """
    configs = {
        "unet": (TinyUNet, UNET),
        "unet_v": (TinyUNetV, UNET),
        "mmdit": (comfy.supported_models.SD3, MMDIT),
        "wan": (comfy.supported_models.WAN21_T2V, WAN),
        "av": (getattr(comfy.supported_models, "LTXAV", None), AV),
        "pixart": (comfy.supported_models.PixArtAlpha, PIXART),
    }
    family, settings = configs[kind]
    config = family(settings | changes)
    return patcher(config.get_model({}, device=torch.device("cpu")), seed)


def cond(seed: int, tokens: int = 5, width: int = CONTEXT, **extra: Any) -> list:
    """A random CONDITIONING with a pooled vector."""
    generator = torch.Generator().manual_seed(1000 + seed)
    context = torch.randn(1, tokens, width, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, width, generator=generator), **extra}]]


def empty_latent(model: Any, batch: int = 1, size: int = 16) -> Tensor:
    """Zeros [batch, channels, size, size]; PixArt divides by the mean of both sides in units of 64, so that one is 64."""
    width = 64 if type(model.model.diffusion_model).__name__ == "PixArtMS" else size
    return torch.zeros(batch, model.model.latent_format.latent_channels, size, width)


def sample(
    model: Any,
    *,
    cfg: float = 4.0,
    steps: int = 6,
    sampler: str = "euler",
    scheduler: str = "normal",
    latent: Tensor | None = None,
    positive: list | None = None,
    negative: list | None = None,
    seed: int = 1,
    **more: Any,
) -> Tensor:
    """What KSampler does: noise from the seed, then the host's own ``comfy.sample.sample``."""
    latent = empty_latent(model) if latent is None else latent
    positive = cond(1) if positive is None else positive
    negative = cond(2) if negative is None else negative
    noise = comfy.sample.prepare_noise(latent, seed)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, disable_pbar=True, seed=seed, **more
        )


def log_of(model: Any) -> Any:
    """The log of the last run of a model that carries a plan."""
    return last_log(plan_of(model.model_options))


def curves_of(log: Any) -> dict[str, dict[int, float]]:
    """A log's curves by the name of what they show."""
    return {quantity.name: curve for quantity, curve in log.curves.items()}


# --- guided models ---------------------------------------------------------------------------------------------------


def guided(model: Any, *rules: Rule) -> Any:
    """The model with rules attached in this order."""
    for rule in rules:
        model = attach(model, rule)
    return model


def pag(model: Any, scale: float = 2.0, **more: Any) -> PAG:
    """PAG in the middle of a model."""
    return PAG(perturbation=IdentityAttention(resolve_layers(model, "auto")), scale=scale, **more)


def all_rules(kind: str, weak_seed: int = 7) -> list[Rule]:
    """APG, PAG and autoguidance for a tiny model of one kind, at strengths that keep random networks finite."""
    return [APG(momentum=-0.5), pag(tiny(kind)), Autoguidance(weak_model=tiny(kind, seed=weak_seed), scale=1.5)]


def neutral_rules(kind: str) -> list[Rule]:
    """The same methods at settings that change nothing."""
    apg = APG(eta=1.0, norm_threshold=0.0, momentum=0.0)
    return [apg, pag(tiny(kind), scale=0.0), Autoguidance(weak_model=tiny(kind, seed=7), scale=1.0)]


def with_wrapper(model: Any, kind: str, wrapper: Callable) -> Any:
    """A clone with a wrapper of another pack."""
    clone = model.clone()
    clone.add_wrapper_with_key(kind, "another pack", wrapper)
    return clone


def interrupted_at(model: Any, moment: int) -> tuple[Any, list[int]]:
    """The model with a run that the user cancels in its ``moment``-th call, and a list that grows with every call."""
    calls: list[int] = []

    def network(apply_model: Callable, args: dict[str, Any]) -> Tensor:
        calls.append(1)
        if len(calls) == moment:
            comfy.model_management.interrupt_current_processing()
        return apply_model(args["input"], args["timestep"], **args["c"])

    stopping = model.clone()
    stopping.set_model_unet_function_wrapper(network)
    return stopping, calls


@contextlib.contextmanager
def counted(*models: Any) -> Iterator[list[int]]:
    """The rows of every forward pass of the models' networks, counted by torch and not by us."""
    rows: list[int] = []
    count = lambda network, args: rows.append(len(args[0]))  # noqa: E731
    handles = [model.model.diffusion_model.register_forward_pre_hook(count) for model in models]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


# --- the same guidance without the engine ----------------------------------------------------------------------------


def reference(model: Any, *rules: Rule, parts: tuple[int, ...] = (), stages: int = 1) -> Any:
    """A clone that computes the rules' guidance in one post-CFG function, with a separate unfused evaluation for every branch.

    parts: sizes of the parts of a packed latent, which are measured apart. stages: evaluations per solver step. For one run only.
    """
    clone = model.clone()
    momentum: dict[str, Tensor | None] = {"before": None, "after": None}
    evaluations = itertools.count()

    def with_momentum(g: Tensor, beta: float) -> Tensor:
        starts = next(evaluations) % stages == 0
        if starts:
            momentum["before"] = momentum["after"]
        m = g if momentum["before"] is None else g + beta * momentum["before"]
        if starts:
            momentum["after"] = m
        return m

    def post_cfg(args: dict[str, Any]) -> Tensor:
        c, u, w = args["cond_denoised"], args["uncond_denoised"], args["cond_scale"]
        denoised = args["denoised"]
        for rule in rules:
            if isinstance(rule, APG) and args["uncond"] is not None:
                g = with_momentum(c - u, rule.momentum)
                update = [
                    projected_update(a[None], b[None], rule.eta, rule.norm_threshold)
                    for row, reference_row in zip(g.flatten(1), c.flatten(1), strict=True)
                    for a, b in zip(*(x.split(parts or len(x)) for x in (row, reference_row)), strict=True)
                ]
                denoised = c + (w - 1) * torch.cat(update, dim=1).reshape(c.shape).float()
        for rule in rules:
            if isinstance(rule, PAG):
                denoised = denoised + rule.scale * (c - _perturbed(args, rule.perturbation))
            elif isinstance(rule, Autoguidance):
                denoised = denoised + (rule.scale - 1) * (c - _weak(args, rule.weak_model))
        return denoised

    clone.set_model_sampler_post_cfg_function(post_cfg)
    return clone


def _perturbed(args: dict[str, Any], perturbation: IdentityAttention) -> Tensor:
    """One evaluation of the positive conditioning with identity attention in all rows."""

    def perturb(executor: Any, x: Tensor, t: Tensor, *more: Any, **kwargs: Any) -> Tensor:
        options = perturbation.patch(more[3], [True] * len(more[3]["cond_or_uncond"]))
        with contextlib.ExitStack() as stack:
            for around in options.get(AROUND, ()):
                stack.enter_context(around(executor.class_obj.diffusion_model))
            return executor(x, t, *more[:3], options, *more[4:], **kwargs)

    options = comfy.model_patcher.create_model_options_clone(args["model_options"])
    wrappers = options["transformer_options"].setdefault("wrappers", {}).setdefault(WrappersMP.APPLY_MODEL, {})
    wrappers.setdefault("reference", []).append(perturb)
    return comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)[0]


def _weak(args: dict[str, Any], weak_model: Any) -> Tensor:
    weak_model.model.current_patcher = weak_model
    options = {"transformer_options": {}} | {k: v for k, v in args["model_options"].items() if k == "context_handler"}
    options["transformer_options"]["sample_sigmas"] = args["model_options"]["transformer_options"]["sample_sigmas"]
    return comfy.samplers.calc_cond_batch(weak_model.model, [args["cond"]], args["input"], args["sigma"], options)[0]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two results agree up to float32 rounding, relative to their size."""
    return bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= tolerance * float(b.abs().max())
