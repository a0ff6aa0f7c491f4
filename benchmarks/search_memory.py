"""What a policy search keeps in memory: ``python run.py bench search_memory [--size PIXELS] [--batch N] [--write]``.

One step's way forward and back through an UNet of SDXL's shape in float16, both prompts in one call, as the search does it. Tensors are
on torch's meta device: their sizes are counted and nothing is computed, so that the figures are those of the algorithm on any machine,
without what an allocator wastes and without cuDNN's workspaces. Attention is counted as a fused kernel: it keeps q, k, v and its result.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lodestar.benchmarks import _results
from lodestar.guiders.learning.checkpoints import checkpointed, checkpointed_call

SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2], "channel_mult": (1, 2, 4),
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10,
    "num_heads": -1, "num_head_channels": 64, "use_spatial_transformer": True, "use_linear_in_transformer": True, "context_dim": 2048,
    "num_classes": "sequential", "adm_in_channels": 2816, "use_temporal_attention": False, "legacy": False,
}  # fmt: skip


class Live(TorchDispatchMode):
    """Bytes of all storages made inside and still alive, and the most there have been; those of ``network`` do not count."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


class Fused(torch.autograd.Function):
    """The memory of a fused attention kernel, [B, tokens, width]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps q, k, v and the result."""
        result = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, result)
        return result

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        """Three gradients."""
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def unet() -> UNetModel:
    """The network, without values."""
    return UNetModel(**SDXL, dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init).requires_grad_(False)


def peak(size: int, batch: int, blocks: bool, gradients: bool = True) -> int:
    """Bytes at the worst moment of one step for pictures of ``size`` pixels, besides the weights."""
    network = unet()
    half = {"dtype": torch.float16, "device": "meta"}
    x = torch.empty(2 * batch, 4, size // 8, size // 8, **half)
    more = {"context": torch.empty(2 * batch, 77, 2048, **half), "y": torch.empty(2 * batch, 2816, **half)}
    attention = {"optimized_attention_override": lambda function, q, k, v, *args, **kwargs: Fused.apply(q, k, v)}

    def evaluate(x: Tensor) -> Tensor:
        return network(x, torch.empty(2 * batch, device="meta"), transformer_options=dict(attention), **more)

    with Live(network) as live, checkpointed(network) if blocks else contextlib.nullcontext(), torch.set_grad_enabled(gradients):
        x = x.clone().requires_grad_(gradients)
        result = checkpointed_call(evaluate, x) if gradients else evaluate(x)
        if gradients:
            result.sum().backward()
    return live.peak


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, metavar="PIXELS", help="side of the pictures (default: 1024)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures at a time (default: 1)")
    _results.add_option(parser)
    args = parser.parse_args(argv)
    write = _results.is_wanted(parser, args)
    weights = sum(parameter.nbytes for parameter in unet().parameters())
    gib = 1 << 30
    about = f"SDXL's UNet in float16 (its weights: {weights / gib:.1f} GiB), {args.batch} x {args.size} pixels, both prompts."
    lines = [about, "", "| besides the weights | GiB |", "|---|---|"]
    for label, settings in {
        "sampling": (False, False),
        "search, a checkpoint per step": (False, True),
        "search, a checkpoint per step and per block": (True, True),
    }.items():
        lines.append(f"| {label} | {peak(args.size, args.batch, *settings) / gib:.1f} |")
    print("\n".join(lines))
    if write:
        _results.write(_results.RESULTS, "search_memory", "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
