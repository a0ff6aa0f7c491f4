"""Where Adaptive Guidance switches: ``python run.py bench gamma [--space noise] [--cfg 7.5] [--write]``.

Samples captions with plain CFG, measures gamma (the cosine of the conditional and the unconditional prediction) in every step, and
prints its spread over the captions, the evaluations that thresholds leave, and the threshold with which half of the captions have
CFG in half of the steps (30 of 40 NFE at 20 steps, the paper's setting).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lodestar.benchmarks import _results
from lodestar.benchmarks._sampling import empty, ksampler, prompts
from lodestar.demo import models
from lodestar.demo.shapes import captions, random_scenes
from lodestar.guiders.policies.adaptive import SPACES, Space, gamma, in_space
from lodestar.guiders.spaces import Layout, is_flow

THRESHOLDS = (0.9, 0.95, 0.97, 0.98, 0.99, 0.991, 0.994, 0.996, 0.999)
SEED = 21


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models.MODELS, default=models.MODELS, help="which models (default: both)")
    parser.add_argument("--space", choices=SPACES, default="denoised", help="what is compared (default: denoised)")
    parser.add_argument("--cfg", type=float, default=4.0, metavar="W", help="the sampler's cfg (default: 4)")
    parser.add_argument("--steps", type=int, default=20, metavar="T", help="sampling steps (default: 20)")
    parser.add_argument("--prompts", type=int, default=20, metavar="N", help="number of captions (default: 20)")
    parser.add_argument("--sampler", default="euler", metavar="NAME", help="a sampler of one evaluation per step (default: euler)")
    _results.add_option(parser)
    args = parser.parse_args(argv)
    write = _results.is_wanted(parser, args)
    parts = [f"{args.prompts} captions, cfg {args.cfg:g}, {args.steps} steps of {args.sampler}; gamma of {args.space} predictions"]
    for model in args.models:
        measured = curves(model, args.space, args.cfg, args.steps, args.prompts, args.sampler)
        parts.append(f"{model}:\n\n{table(measured)}\n\n{savings(measured)}")
    text = "\n\n".join(parts)
    print(text)
    if write:
        _results.write(_results.RESULTS, "gamma", text)
    return 0


@torch.inference_mode()
def curves(model: str, space: Space, cfg: float, steps: int, count: int, sampler: str) -> Tensor:
    """gamma [T, N] of every step and caption in CFG runs."""
    patcher = models.load_model(model, "main")
    flow = is_flow(patcher.get_model_object("model_sampling"))
    found: list[Tensor] = []

    def post_cfg(args: dict[str, Any]) -> Tensor:
        pair = (in_space(space, args[name], args["input"], args["sigma"], flow) for name in ("cond_denoised", "uncond_denoised"))
        found.append(gamma(*pair, Layout()))
        return args["denoised"]

    patcher = patcher.clone()
    patcher.set_model_sampler_post_cfg_function(post_cfg)
    texts = captions(random_scenes(count, torch.Generator().manual_seed(SEED)))
    settings = {"steps": steps, "cfg": cfg, "sampler": sampler, "scheduler": models.SCHEDULERS[model]}
    ksampler(patcher, prompts(texts), empty(count), seed=SEED, **settings)
    return torch.stack(found)


def cfg_steps(measured: Tensor, threshold: float) -> Tensor:
    """Steps with CFG [N] when CFG ends after the step that reaches the threshold, from gamma [T, N]."""
    met = measured.cummax(dim=0).values >= threshold
    return (len(measured) - met.sum(dim=0) + 1).clamp(max=len(measured))


def middle(measured: Tensor) -> float:
    """The threshold that the median caption reaches in the last step of the first half, from gamma [T, N]."""
    highest = measured.cummax(dim=0).values.median(dim=1).values
    half = len(measured) // 2
    return float(highest[half - 2 : half].mean())


def table(measured: Tensor) -> str:
    """Lowest, median and highest gamma of the captions, a line for each step."""
    lines = ["| step | lowest | median | highest |", "|-----:|-------:|-------:|--------:|"]
    for step, values in enumerate(measured):
        lines.append(f"| {step:4} | {values.min():.4f} | {values.median():.4f} |  {values.max():.4f} |")
    return "\n".join(lines)


def savings(measured: Tensor) -> str:
    """What thresholds cost."""
    steps = len(measured)
    recommended = middle(measured)
    lines = []
    for threshold in sorted({*THRESHOLDS, recommended}):
        guided = cfg_steps(measured, threshold)
        spread = f"CFG in {int(guided.min())} to {int(guided.max())} steps"
        note = ""
        if threshold == recommended:
            note = "  <- the median caption has CFG in half of the steps"
            if abs(float(guided.median()) - steps / 2) > 1:
                note = "  <- no threshold halves the run: gamma does not rise"
        lines.append(f"- threshold {threshold:.4f}: {steps + guided.double().mean():.1f} of {2 * steps} NFE, {spread}{note}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
