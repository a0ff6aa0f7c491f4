"""Tiny models of the host's own classes and the shortest way to sample them. Import inside tests that use the ``host`` fixture."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from torch import Tensor

KINDS = ("unet", "unet_v", "mmdit")  # eps, v and flow
CONTEXT = 32


class TinyUNet(comfy.supported_models.SD15):
    """The host's UNetModel: two levels and a middle block with attention; eps or v prediction."""

    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}
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
    """One of KINDS with random weights; ``changes`` go into the network's configuration."""
    if kind == "mmdit":
        config = comfy.supported_models.SD3(MMDIT | changes)
    else:
        config = (TinyUNetV if kind == "unet_v" else TinyUNet)(UNET | changes)
    return patcher(config.get_model({}, device=torch.device("cpu")), seed)


def cond(seed: int, tokens: int = 5, width: int = CONTEXT, **extra: Any) -> list:
    """A random CONDITIONING with a pooled vector."""
    generator = torch.Generator().manual_seed(1000 + seed)
    context = torch.randn(1, tokens, width, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, width, generator=generator), **extra}]]


def empty_latent(model: Any, batch: int = 1, size: int = 16) -> Tensor:
    """Zeros [batch, channels, size, size]."""
    return torch.zeros(batch, model.model.latent_format.latent_channels, size, size)


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
    from lodestar.guiders.plan import plan_of
    from lodestar.guiders.run import last_log

    return last_log(plan_of(model.model_options))
