"""Tiny models of the host's own classes, and its nodes called by their ids: what a program needs that knows nothing of this pack's modules.

Run by ``run.py python`` or ``run.py bench``, which load the pack.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

import nodes

KINDS = ("unet", "unet_v", "mmdit", "flux")  # eps, v, and two flow models
CONTEXT = 32
TOKENS = 5


@functools.cache
def prepare() -> None:
    """Load the host's extra nodes, and have it work quietly in one thread: threads of networks this small wait for each other."""
    torch.set_num_threads(1)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    logging.getLogger().setLevel(logging.ERROR)
    asyncio.run(nodes.init_builtin_extra_nodes())


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
_MMDIT = {
    "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 1, "num_blocks": 3, "num_patches": None,
    "pos_embed_max_size": 64, "pos_embed_scaling_factor": None, "adm_in_channels": CONTEXT, "qk_norm": "rms",
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": 64}},
    "dtype": torch.float32,
}  # fmt: skip
_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": CONTEXT, "context_in_dim": CONTEXT, "hidden_size": 32,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [], "dtype": torch.float32,
}  # fmt: skip
_CONFIGS = {
    "unet": (TinyUNet, UNET),
    "unet_v": (TinyUNetV, UNET),
    "mmdit": (comfy.supported_models.SD3, _MMDIT),
    "flux": (comfy.supported_models.Flux, _FLUX),
}


def build(kind: str, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """A new model of one of KINDS on the CPU, with random weights."""
    family, settings = _CONFIGS[kind]
    return patcher(family(dict(settings)).get_model({}, device=torch.device("cpu")), seed)


def patcher(network: comfy.model_base.BaseModel, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """A model with random weights in the host's ModelPatcher, on the CPU."""
    fill(network.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(network.eval(), load_device=cpu, offload_device=cpu)


def tiny(kind: str, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """The same, made once."""
    return _made(kind, seed)


_made = functools.cache(build)


def fill(network: torch.nn.Module, seed: int) -> None:
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


def cond(seed: int, **extra: Any) -> list:
    """A random CONDITIONING with a pooled vector."""
    generator = torch.Generator().manual_seed(1000 + seed)
    context = torch.randn(1, TOKENS, CONTEXT, generator=generator)
    return [[context, {"pooled_output": torch.randn(1, CONTEXT, generator=generator), **extra}]]


def latent(model: Any, batch: int = 1, height: int = 8, width: int = 8, seed: int | None = None) -> dict[str, Tensor]:
    """An empty LATENT [batch, channels, height, width] for a model; with a seed a random one."""
    shape = (batch, model.model.latent_format.latent_channels, height, width)
    if seed is None:
        return {"samples": torch.zeros(shape)}
    return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


class TinyVAE:
    """A VAE of 8 pixels to a latent pixel that needs no weights: colours are channels, sizes are averaged and repeated."""

    device, vae_dtype, latent_dim = torch.device("cpu"), torch.float32, 2

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.patcher = comfy.model_patcher.ModelPatcher(torch.nn.Linear(1, 1), load_device=self.device, offload_device=self.device)

    def spacial_compression_encode(self) -> int:
        """Pixels to a latent pixel."""
        return 8

    spacial_compression_decode = spacial_compression_encode

    def memory_used_decode(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Next to nothing."""
        return 1

    memory_used_encode = memory_used_decode

    def decode(self, samples: Tensor) -> Tensor:
        """[B, C, h, w] to pictures [B, 8 h, 8 w, 3]."""
        return samples[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1) * 0.5 + 0.5

    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures [B, H, W, 3] to [B, C, H / 8, W / 8]."""
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1) * 2 - 1, 8)
        return small.repeat(1, math.ceil(self.channels / 3), 1, 1)[:, : self.channels]


def call(node_id: str, **inputs: Any) -> tuple:
    """What a node returns: as the host's executor calls it, with the schema's defaults for inputs that are not given."""
    kind = nodes.NODE_CLASS_MAPPINGS[node_id]
    values = {**defaults(node_id), **inputs}
    if hasattr(kind, "EXECUTE_NORMALIZED"):
        return kind.EXECUTE_NORMALIZED(**values).result or ()
    result = getattr(kind(), kind.FUNCTION)(**values)
    return result.get("result", ()) if isinstance(result, dict) else result


@functools.cache
def defaults(node_id: str) -> dict[str, Any]:
    """The values that a new node of this type has."""
    groups = nodes.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()
    found: dict[str, Any] = {}
    for group in ("required", "optional"):
        for name, (kind, *rest) in groups.get(group, {}).items():
            config = rest[0] if rest else {}
            options = kind if isinstance(kind, (list, tuple)) else config.get("options")
            if "default" in config:
                found[name] = config["default"]
            elif options:
                found[name] = options[0]
    return found


@contextlib.contextmanager
def counted(*models: Any) -> Iterator[list[int]]:
    """The rows of every forward pass of the models' networks, counted by torch and not by us."""
    rows: list[int] = []

    def count(network: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        rows.append(len(args[0] if args else kwargs["x"]))

    networks = {id(model.model): model.model.diffusion_model for model in models}
    handles = [network.register_forward_pre_hook(count, with_kwargs=True) for network in networks.values()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
