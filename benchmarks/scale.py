"""What large pictures cost: ``python run.py bench scale [--write]``.

An SDXL-shaped UNet and an SD3-medium-shaped MMDiT of the host's own classes, with random weights: direct sampling at the target size,
the recipe of two KSamplers with an enlarged latent between them, and FreCaS with its authors' steps.

Counted: floating-point operations by shape alone (meta tensors: no weights, no memory), so that every machine prints the same.
On a GPU, also seconds and peak memory of real runs through the host's samplers and VAE.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.ldm.models.autoencoder import AutoencoderKL
from einops import rearrange
from torch import Tensor

from lodestar.benchmarks import _results
from lodestar.benchmarks._flops import counted_flops
from lodestar.benchmarks._sampling import Conds, ksampler
from lodestar.guiders.frecas.cascade import Cascade
from lodestar.guiders.frecas.stages import Stage

CFG, NATIVE, PIXELS, TEXT = 7.5, 1024, 8, {"sdxl": 77, "sd3": 154}
DENOISE = 0.5  # of the second KSampler: half of the steps of the first
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_spatial_transformer": True, "use_linear_in_transformer": True, "context_dim": 2048, "num_head_channels": 64, "legacy": False,
    "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip
MMDIT = {
    "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 24, "num_patches": None, "pos_embed_max_size": 192,
    "pos_embed_scaling_factor": None, "adm_in_channels": 2048,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
}  # fmt: skip
VAE = {
    "embed_dim": 4, "ddconfig": {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """An architecture: its configuration in the host, channels of its latent, widths of its conditioning, largest side in pixels."""

    family: Any
    config: dict[str, Any]
    channels: int
    context: int
    pooled: int
    largest: int | None = None


SHAPES = {
    "sdxl": Shape(comfy.supported_models.SDXL, UNET, 4, 2048, 2816),
    "sd3": Shape(comfy.supported_models.SD3, MMDIT, 16, 4096, 2048, 192 * 2 * PIXELS),
}
DIRECT = {"sdxl": 50, "sd3": 28}  # steps: as many as FreCaS has in all
FRECAS = {  # the authors' stages
    ("sdxl", 2048): (Stage(1024, 1024, 40, 0.572), Stage(2048, 2048, 10)),
    ("sdxl", 4096): (Stage(1024, 1024, 30, 1.164), Stage(2048, 2048, 5, 0.572), Stage(4096, 4096, 15)),
    ("sd3", 2048): (Stage(1024, 1024, 20, 0.136), Stage(2048, 2048, 8)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counted", action="store_true", help="do not run anything, on a GPU either")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    parser.add_argument("--sizes", nargs="+", type=int, choices=(2048, 4096), default=[2048, 4096], help="default: 2048 4096")
    _results.add_option(parser)
    args = parser.parse_args(argv)
    write = _results.is_wanted(parser, args)
    timed = comfy.model_management.get_torch_device().type == "cuda" and not args.counted
    found = {}
    for name in args.models:
        for size in args.sizes:
            if SHAPES[name].largest is not None and size > SHAPES[name].largest:
                found[name, size] = f"Its position encoding ends at {SHAPES[name].largest} pixels."
            else:
                found[name, size] = table(name, size, timed)
            print(f"\n{name} to {size}x{size}\n\n{found[name, size]}")
    if write:
        _results.write(_results.RESULTS, "scale", "\n\n".join(f"**{n} to {s}x{s}**\n\n{text}" for (n, s), text in found.items()))
        _results.write(_results.README, "scale", sentence("sdxl", 2048))
    return 0


def sentence(name: str, size: int) -> str:
    """For the README: what FreCaS costs, of direct sampling."""
    found = {label: flops_of(name, stages, through_pixels=label == "FreCaS") for label, stages in recipes(name, size).items()}
    two, cascade = (found[label] / found["direct"] for label in ("two KSamplers", "FreCaS"))
    return (
        f"A picture of {size} pixels by a network of SDXL's shape: FreCaS takes {cascade:.0%} of the work of direct sampling, "
        f"two KSamplers with an enlarged latent between them {two:.0%}."
    )


def table(name: str, size: int, timed: bool) -> str:
    """Markdown: every recipe's TFLOPs, share of the direct one and, on a GPU, seconds and peak memory."""
    lines = ["| recipe | steps | TFLOPs | of direct |" + (" seconds | peak GB |" if timed else "")]
    lines += ["|---|---|---|---|" + ("---|---|" if timed else "")]
    direct = None
    for label, stages in recipes(name, size).items():
        flops = flops_of(name, stages, through_pixels=label == "FreCaS")
        direct = direct or flops
        steps = ", ".join(f"{stage.steps} at {stage.width}" for stage in stages)
        line = f"| {label} | {steps} | {flops / 1e12:.0f} | {flops / direct:.2f} |"
        if timed:
            seconds, peak = timed_run(RUNS[label], real_model(name), real_vae(name), stages, name)
            line += f" {seconds:.1f} | {peak / 2**30:.1f} |"
        lines.append(line)
    return "\n".join(lines)


def recipes(name: str, size: int) -> dict[str, tuple[Stage, ...]]:
    """The three ways to a picture of ``size`` pixels, as the steps they take at each size."""
    steps = DIRECT[name]
    return {
        "direct": (Stage(size, size, steps),),
        "two KSamplers": (Stage(NATIVE, NATIVE, steps), Stage(size, size, round(steps * DENOISE))),
        "FreCaS": FRECAS[name, size],
    }


# --- counted ---------------------------------------------------------------------------------------------------------


def flops_of(name: str, stages: Sequence[Stage], through_pixels: bool) -> int:
    """Floating-point operations of one picture with CFG, but for the last decoding, which all recipes share."""
    total = sum(2 * stage.steps * flops_of_row(name, stage.width, stage.height) for stage in stages)
    if through_pixels:
        for small, large in pairwise(stages):
            total += flops_of_vae("decode", small.width, small.height) + flops_of_vae("encode", large.width, large.height)
    return total


@cache
def flops_of_row(name: str, width: int, height: int) -> int:
    """One forward pass of one row."""
    shape = SHAPES[name]
    inputs = (torch.empty(1, shape.channels, height // PIXELS, width // PIXELS, device="meta"), torch.empty(1, device="meta"))
    context = torch.empty(1, TEXT[name], shape.context, device="meta")
    pooled = torch.empty(1, shape.pooled, device="meta")
    with counted_flops() as counter, torch.inference_mode():
        options = {"optimized_attention_override": meta_attention}
        _meta_network(name)(*inputs, context=context, y=pooled, transformer_options=options)
    return counter.get_total_flops()


@cache
def flops_of_vae(way: str, width: int, height: int) -> int:
    """Decoding or encoding a picture of this size with SDXL's autoencoder (SD3's differs in its 16 channels alone)."""
    with torch.device("meta"):
        network = AutoencoderKL(**VAE).eval()
    for module in network.modules():  # its one attention, by torch's kernel
        if hasattr(module, "optimized_attention"):
            module.optimized_attention = _attention_of_pixels
    sides = (height, width) if way == "encode" else (height // PIXELS, width // PIXELS)
    given = torch.empty(1, 3 if way == "encode" else 4, *sides, device="meta")
    with counted_flops() as counter, torch.inference_mode():
        getattr(network, way)(given)
    return counter.get_total_flops()


@cache
def _meta_network(name: str) -> torch.nn.Module:
    shape = SHAPES[name]
    config = shape.family(shape.config | {"dtype": torch.float32})
    return config.get_model({}, device=torch.device("meta")).diffusion_model.eval()


def meta_attention(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
    """The host's attention as one kernel that the counter knows: q [B, N, H*d] or [B, N, H, d] -> [B, N, H*d]."""
    if not kwargs.get("skip_reshape"):
        q, k, v = (x.reshape(len(x), x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def _attention_of_pixels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, C, H, W], one head."""
    flat = (rearrange(x, "b c h w -> b 1 (h w) c") for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(*flat), "b 1 (h w) c -> b c h w", h=q.shape[2])


# --- timed -----------------------------------------------------------------------------------------------------------


@cache
def real_model(name: str) -> comfy.model_patcher.ModelPatcher:
    """The network in half precision with small random weights, where the host wants it."""
    shape, device = SHAPES[name], comfy.model_management.get_torch_device()
    model = shape.family(shape.config | {"dtype": torch.float16}).get_model({}, device=device)
    _fill(model.diffusion_model.eval())
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())


@cache
def real_vae(name: str) -> comfy.sd.VAE:
    """The host's VAE with SDXL's autoencoder and as many latent channels as the model has."""
    channels = SHAPES[name].channels
    params = {"embed_dim": channels, "ddconfig": VAE["ddconfig"] | {"z_channels": channels}}
    vae = comfy.sd.VAE(sd={"decoder.conv_in.weight": torch.zeros(512, channels, 3, 3)}, config={"params": params})
    _fill(vae.first_stage_model)
    return vae


def _fill(network: torch.nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data.uniform_(-0.02, 0.02)


def conditioning(name: str) -> list:
    """A random prompt. SDXL's model appends its sizes to a pooled vector of 1280."""
    pooled = 1280 if name == "sdxl" else SHAPES[name].pooled
    return [[torch.randn(1, TEXT[name], SHAPES[name].context), {"pooled_output": torch.randn(1, pooled)}]]


def timed_run(run: Callable[..., Tensor], model: Any, vae: Any, stages: Sequence[Stage], name: str) -> tuple[float, int]:
    """Seconds and peak bytes of a recipe, after one run of single steps to warm up."""
    conds = conditioning(name), conditioning(name)
    short = [Stage(stage.width, stage.height, min(stage.steps, 2), stage.end) for stage in stages]
    with torch.inference_mode():
        run(model, vae, short, conds)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        run(model, vae, stages, conds)
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated()


def run_direct(model: Any, vae: Any, stages: Sequence[Stage], conds: Conds) -> Tensor:
    """One KSampler, then a second one on the enlarged latent if there is a second size; the picture."""
    latent, denoise = _empty(model, stages[0]), 1.0
    for stage in stages:
        size = stage.width // PIXELS, stage.height // PIXELS
        latent = comfy.utils.common_upscale(latent, *size, "nearest-exact", "disabled")
        latent = ksampler(model, conds, latent, steps=stage.steps, cfg=CFG, scheduler="normal", seed=1, denoise=denoise)
        denoise = DENOISE
    return vae.decode(latent)


def run_frecas(model: Any, vae: Any, stages: Sequence[Stage], conds: Conds) -> Tensor:
    """The cascade; the picture."""
    cascade = Cascade(
        model=model, vae=vae, stages=stages, cfg=CFG, sampler="euler", scheduler="normal", gamma=-1.0, high_scale=35.0, map_weight=0.6
    )
    return vae.decode(cascade.sample(*conds, 1, cascade.latent(None, 1))[-1]["samples"])


def _empty(model: Any, stage: Stage) -> Tensor:
    channels = model.get_model_object("latent_format").latent_channels
    return torch.zeros(1, channels, stage.height // PIXELS, stage.width // PIXELS)


RUNS = {"direct": run_direct, "two KSamplers": run_direct, "FreCaS": run_frecas}

if __name__ == "__main__":
    raise SystemExit(main())
