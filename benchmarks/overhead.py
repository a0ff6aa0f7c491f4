"""What the engine itself costs: ``python run.py bench overhead [--steps N] [--runs N] [--large]``.

Milliseconds of a step on a tiny network, whose own work is next to nothing: CFG without this pack, with a rule that does hardly anything,
and with PAG, with what it shares and without. In turns in one run of the program, each as its median; processor time of one core.

``--large``: seconds of a step of CFG with PAG instead, against ComfyUI's own PAG, by a UNet of 152 million parameters on 32x32 latents, so
that overhead does not rule. Both perturb the middle block.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import comfy.sample
import torch

from lodestar.benchmarks import _tiny
from lodestar.guiders.engine import rows
from lodestar.guiders.engine.sharing import chunks_of

KINDS = ("unet", "mmdit")
PAG, UNSHARED, HOST = "CFG + PAG", "CFG + PAG, nothing shared", "CFG + ComfyUI's own PAG"
METHODS = {  # how the MODEL is made
    "CFG, without this pack": lambda model: model,
    "CFG + APG": lambda model: _tiny.call("LodestarAPG", model=model)[0],
    UNSHARED: lambda model: _tiny.call("LodestarPAG", model=model)[0],
    PAG: lambda model: _tiny.call("LodestarPAG", model=model)[0],
}
LARGE = {HOST: lambda model: _tiny.call("PerturbedAttentionGuidance", model=model, scale=3.0)[0], PAG: METHODS[PAG]}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="sampling steps (default: 20)")
    parser.add_argument("--runs", type=int, default=9, metavar="N", help="runs of each (default: 9)")
    parser.add_argument("--large", action="store_true", help="seconds on a larger network, against ComfyUI's own PAG")
    args = parser.parse_args(argv)
    _tiny.prepare()
    if args.large:
        times = measured(large(), LARGE, args.steps, args.runs, 32)
        print("".join(f"{name}: {value / 1000:.3f} s per step\n" for name, value in times.items()))
        print(f"ratio of the medians: {times[PAG] / times[HOST]:.3f}")
        return 0
    print("milliseconds per step\n")
    print(f"| | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    found = {kind: measured(_tiny.tiny(kind), METHODS, args.steps, args.runs) for kind in KINDS}
    for name in METHODS:
        print(f"| {name} | {' | '.join(f'{found[kind][name]:.2f}' for kind in KINDS)} |")
    more = ", ".join(f"{found[kind][PAG] - found[kind][UNSHARED]:+.2f} ({kind})" for kind in KINDS)
    print(f"\nsharing, above none: {more}")
    return 0


def measured(model: Any, methods: dict[str, Callable[[Any], Any]], steps: int, runs: int, side: int = 8) -> dict[str, float]:
    """Milliseconds per step of each method, on a latent of this side."""
    models = {name: build(model) for name, build in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(runs + 1):
        for name, chosen in models.items():
            seconds = timed(lambda chosen=chosen: sample(chosen, steps, side), shared=name != UNSHARED)
            if turn > 0:  # the first one warms up
                times[name].append(1000 * seconds / steps)
    return {name: median(values) for name, values in times.items()}


def timed(run: Callable[[], Any], shared: bool) -> float:
    """Processor time of a run, in seconds."""
    rows.chunks_of = chunks_of if shared else lambda *_: None
    began = time.process_time()
    try:
        run()
        return time.process_time() - began
    finally:
        rows.chunks_of = chunks_of


def large() -> Any:
    """A UNet with random weights, of SDXL's proportions."""
    config = {
        "model_channels": 128, "num_res_blocks": [2, 2, 2], "channel_mult": (1, 2, 4), "transformer_depth": [0, 0, 1, 1, 3, 3],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 3, 3, 3], "transformer_depth_middle": 3,
    }  # fmt: skip
    return _tiny.patcher(_tiny.TinyUNet(_tiny.UNET | config).get_model({}, device=torch.device("cpu")))


def sample(model: Any, steps: int, side: int) -> torch.Tensor:
    """What KSampler does."""
    latent = _tiny.latent(model, height=side, width=side)["samples"]
    noise = comfy.sample.prepare_noise(latent, 1)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, 4.0, "euler", "normal", _tiny.cond(1), _tiny.cond(2), latent, disable_pbar=True, seed=1
        )


if __name__ == "__main__":
    raise SystemExit(main())
