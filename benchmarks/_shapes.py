"""What a forward pass of large networks costs, counted by shape alone: meta tensors, no weights, no memory.

For CFG with PAG: the rows of a step are (unconditional, conditional, perturbed), and what the last two have in common is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import comfy.supported_models
import torch

from lodestar.benchmarks._flops import counted_flops
from lodestar.benchmarks.scale import MMDIT, PIXELS, UNET, meta_attention
from lodestar.guiders.engine.branches import Branch
from lodestar.guiders.engine.sharing import Chunks
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.network.layers import resolve_layers

SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_spatial_transformer": True, "use_linear_in_transformer": False,
    "context_dim": 768, "num_heads": 8, "num_head_channels": -1, "legacy": False, "adm_in_channels": None,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
    "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A network of the host's by its configuration, and what it is given: text [tokens, width], widths of vectors, pixels of a side."""

    family: Any
    config: dict[str, Any]
    text: tuple[int, int]
    vectors: tuple[tuple[str, tuple[int, ...]], ...]
    pixels: int = 1024


SHAPES = {
    "SD1.5": Shape(comfy.supported_models.SD15, SD15, (77, 768), (), 512),
    "SDXL": Shape(comfy.supported_models.SDXL, UNET, (77, 2048), (("y", (2816,)),)),
    "SD3-medium": Shape(comfy.supported_models.SD3, MMDIT, (154, 4096), (("y", (2048,)),)),
    "Flux": Shape(comfy.supported_models.Flux, FLUX, (512, 4096), (("y", (768,)), ("guidance", ()))),
}
LAYERS = {  # the recommended ones, and those where a transformer's last third begins
    "SD1.5": ("middle",),
    "SDXL": ("middle",),
    "SD3-medium": ("auto", "double:16"),
    "Flux": ("auto", "single:19"),
}


@cache
def evaluation(name: str) -> int:
    """Floating-point operations of one row."""
    return _flops(name, 1, {})


@cache
def cfg_with_pag(name: str, layers: str, shared: bool = True) -> float:
    """A step of CFG with PAG in these layers, in evaluations."""
    network = _network(name)
    rule = IdentityAttention(resolve_layers(SimpleNamespace(get_model_object={"diffusion_model": network}.get), layers))
    options = rule.patch({"optimized_attention_override": meta_attention, "cond_or_uncond": [1, 0, 0]}, [False, False, True])
    if not shared:
        return _flops(name, 3, options) / evaluation(name)
    chunks = Chunks((None, None, Branch(variant=rule)), ("uncond", "cond", "cond"), 1, {})
    with rule.sharing(network, chunks, options, control=False, measured=False) as sharing:
        return _flops(name, 3, sharing.options) / evaluation(name)


def table() -> str:
    """CFG with PAG by every network, in evaluations, in Markdown. APG adds none."""
    lines = ["| CFG + PAG, with APG or without | pixels | PAG in | FLOPs | of it PAG | nothing shared |", "|---|---|---|---|---|---|"]
    for name, layers in LAYERS.items():
        for layer in layers:
            shared, unshared = (cfg_with_pag(name, layer, shared) for shared in (True, False))
            pixels = SHAPES[name].pixels
            lines.append(f"| a network of {name}'s shape | {pixels} | `{layer}` | {shared:.2f} | {shared - 2:.2f} | {unshared:.2f} |")
    return "\n".join(lines)


def sentence() -> str:
    """For the README: what PAG costs on them."""
    costs = ", ".join(f"{cfg_with_pag(name, layers[0]) - 2:.2f} in a network of {name}'s shape" for name, layers in LAYERS.items())
    return f"What comes before PAG's layers is computed once. So PAG costs less than an evaluation: {costs}."


@cache
def _network(name: str) -> torch.nn.Module:
    shape = SHAPES[name]
    config = shape.family(shape.config | {"dtype": torch.float32})
    return config.get_model({}, device=torch.device("meta")).diffusion_model.eval()


def _flops(name: str, rows: int, options: dict[str, Any]) -> int:
    shape, network = SHAPES[name], _network(name)
    side = shape.pixels // PIXELS
    given = {key: torch.empty(rows, *size, device="meta") for key, size in shape.vectors}
    x = torch.empty(rows, shape.config["in_channels"], side, side, device="meta")
    with counted_flops() as counter, torch.inference_mode():
        network(
            x, torch.empty(rows, device="meta"), context=torch.empty(rows, *shape.text, device="meta"), **given,
            transformer_options={"optimized_attention_override": meta_attention} | options,
        )  # fmt: skip
    return counter.get_total_flops()
