"""What large pictures cost: ``python run.py bench scale [--write]``.

An SDXL-shaped UNet and an SD3-medium-shaped MMDiT of the host's own classes, with random weights: direct sampling at the target size,
the recipe of two KSamplers with an enlarged latent between them, and FreCaS with its authors' steps: as it is, with windows of the
trained size in the stages beyond it, and with Adaptive Guidance as well, counted as if it ended CFG after half of each of these stages
(the paper's quarter fewer evaluations; when it does depends on model and threshold).

Counted: floating-point operations by shape alone (meta tensors: no weights, no memory), so that every machine prints the same, and the
memory of the largest attention: its logits for one row in half precision, as a kernel that writes them out would hold them.
On a GPU, also seconds and peak memory of real runs through the host's samplers and VAE (but for Adaptive Guidance: with random weights
it would switch anywhere).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
import torch.nn.functional as F
from comfy.ldm.models.autoencoder import AutoencoderKL
from einops import rearrange
from torch import Tensor

from lodestar.benchmarks import _results
from lodestar.benchmarks._flops import counted_flops
from lodestar.benchmarks._timed import DENOISE, PIXELS, run_direct, run_frecas, timed_run
from lodestar.guiders.frecas.stages import Stage
from lodestar.guiders.frecas.windows import WindowedAttention, Windows, windowed

NATIVE, TEXT = 1024, {"sdxl": 77, "sd3": 154}
GUIDED = 0.5  # of the steps of FreCaS's later stages that have CFG under Adaptive Guidance
HALF = 2  # bytes
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
RUNS = {"direct": run_direct, "two KSamplers": run_direct, "FreCaS": run_frecas, "FreCaS, windows": run_frecas}
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
    found = {label: cost_of(name, recipe).flops for label, recipe in recipes(name, size).items()}
    two, cascade, least = (found[label] / found["direct"] for label in ("two KSamplers", "FreCaS", "FreCaS, windows, AG"))
    return (
        f"A picture of {size} pixels by a network of SDXL's shape: FreCaS takes {cascade:.0%} of the work of direct sampling "
        f"({least:.0%} with windows and Adaptive Guidance), two KSamplers with an enlarged latent between them {two:.0%}."
    )


def table(name: str, size: int, timed: bool) -> str:
    """Markdown: every recipe's TFLOPs, share of the direct one, largest attention and, on a GPU, seconds and peak memory."""
    lines = ["| recipe | steps | TFLOPs | of direct | largest attention, GB |" + (" seconds | peak GB |" if timed else "")]
    lines += ["|---|---|---|---|---|" + ("---|---|" if timed else "")]
    direct = None
    for label, recipe in recipes(name, size).items():
        cost = cost_of(name, recipe)
        direct = direct or cost.flops
        line = f"| {label} | {recipe} | {cost.flops / 1e12:.0f} | {cost.flops / direct:.3f} | {cost.attention / 1e9:.2f} |"
        if timed and label in RUNS:
            conds = conditioning(name), conditioning(name)
            seconds, peak = timed_run(RUNS[label], real_model(name), real_vae(name), recipe.stages, conds)
            line += f" {seconds:.1f} | {peak / 2**30:.1f} |"
        elif timed:
            line += " | |"
        lines.append(line)
    return "\n".join(lines)


@dataclass(frozen=True)
class Recipe:
    """A way to a picture. cascade: through pixels from stage to stage. guided: share of the steps after the first stage that have CFG."""

    stages: tuple[Stage, ...]
    cascade: bool = False
    guided: float = 1.0

    def __str__(self) -> str:
        parts = []
        for number, stage in enumerate(self.stages):
            windows = "" if stage.windows == (1, 1) else f" in {stage.windows[0]}x{stage.windows[1]}"
            guided = self.guided_steps(number)
            parts.append(f"{stage.steps} at {stage.width}{windows}" + (f" ({guided} with CFG)" if guided < stage.steps else ""))
        return ", ".join(parts)

    def guided_steps(self, number: int) -> int:
        """How many steps of a stage evaluate both prompts: the first ones."""
        return self.stages[number].steps if number == 0 else math.ceil(self.guided * self.stages[number].steps)


def recipes(name: str, size: int) -> dict[str, Recipe]:
    """The ways to a picture of ``size`` pixels."""
    steps, stages = DIRECT[name], FRECAS[name, size]
    small = (stages[0], *(replace(stage, windows=(stage.width // NATIVE, stage.height // NATIVE)) for stage in stages[1:]))
    return {
        "direct": Recipe((Stage(size, size, steps),)),
        "two KSamplers": Recipe((Stage(NATIVE, NATIVE, steps), Stage(size, size, round(steps * DENOISE)))),
        "FreCaS": Recipe(stages, cascade=True),
        "FreCaS, windows": Recipe(small, cascade=True),
        "FreCaS, windows, AG": Recipe(small, cascade=True, guided=GUIDED),
    }


# --- counted ---------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Floating-point operations, and bytes of the largest attention's logits."""

    flops: int
    attention: int


def cost_of(name: str, recipe: Recipe) -> Cost:
    """One picture, but for the last decoding, which all recipes share."""
    flops, attention = 0, 0
    for number, stage in enumerate(recipe.stages):
        rows = [cost_of_row(name, stage.width, stage.height, stage.windows, shifted) for shifted in (False, True)]
        guided = recipe.guided_steps(number)
        flops += sum(rows[step % 2].flops * (2 if step < guided else 1) for step in range(stage.steps))
        attention = max(attention, *(row.attention for row in rows))
    for small, large in pairwise(recipe.stages) if recipe.cascade else ():
        flops += flops_of_vae("decode", small.width, small.height) + flops_of_vae("encode", large.width, large.height)
    return Cost(flops, attention)


@cache
def cost_of_row(name: str, width: int, height: int, windows: tuple[int, int] = (1, 1), shifted: bool = False) -> Cost:
    """One forward pass of one row."""
    shape, network, attention = SHAPES[name], _meta_network(name), _Largest()
    x = torch.empty(1, shape.channels, height // PIXELS, width // PIXELS, device="meta")
    context = torch.empty(1, TEXT[name], shape.context, device="meta")
    pooled = torch.empty(1, shape.pooled, device="meta")
    options = {"optimized_attention_override": WindowedAttention(attention)}
    if windows != (1, 1):
        options = windowed(network, Windows(*windows, shifted), options, x)
    with counted_flops() as counter, torch.inference_mode():
        network(x, torch.empty(1, device="meta"), context=context, y=pooled, transformer_options=options)
    return Cost(counter.get_total_flops(), HALF * attention.logits)


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


class _Largest:
    """``meta_attention`` that notes the logits of the largest call."""

    def __init__(self) -> None:
        self.logits = 0

    def __call__(self, func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        self.logits = max(self.logits, heads * q.shape[1] * k.shape[1])
        return meta_attention(func, q, k, v, heads, *args, **kwargs)


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


if __name__ == "__main__":
    raise SystemExit(main())
