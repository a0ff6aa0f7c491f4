"""What guidance costs: ``python run.py bench cost [--steps N]``.

For each method: model calls, rows and evaluations (NFE) of a step, and counted floating-point operations relative to one
conditional forward pass. Counted, not timed, so that every machine prints the same. Ours and the host's own nodes are counted
by the same wrapper in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_apg, nodes_custom_sampler, nodes_pag
from tqdm import tqdm

from lodestar.benchmarks._flops import counted_flops
from lodestar.demo import models
from lodestar.demo.shapes import SIZE
from lodestar.guiders.cfgpp_sampler import cfgpp_sampler
from lodestar.nodes.apg import LodestarAPG
from lodestar.nodes.autoguidance import LodestarAutoguidance
from lodestar.nodes.interval import LodestarGuidanceInterval
from lodestar.nodes.pag import LodestarPAG

CAPTION = "a large purple pentagon on a cream background"
CFG, BATCH, SEED = 4.0, 2, 7


class Models(NamedTuple):
    """The two MODELs that methods are made of, counted alike."""

    main: Any
    weak: Any


class Method(NamedTuple):
    """A method by name, the MODEL or GUIDER its nodes make, and the sampler's cfg."""

    name: str
    build: Callable[[Models], Any]
    cfg: float = CFG
    sampler: Any = comfy.samplers.sampler_object("euler")


@dataclass
class Count:
    """Counters of one sampling run; ``latent`` is its result."""

    calls: int = 0
    rows: int = 0
    nfe: int = 0
    flops: int = 0
    latent: torch.Tensor | None = None

    def apply_model(self, executor: Any, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A wrapper around the model that counts its calls."""
        options = kwargs.get("transformer_options") or next(arg for arg in args if isinstance(arg, dict))
        self.calls += 1
        self.rows += len(x)
        self.nfe += len(options["cond_or_uncond"])
        return executor(x, t, *args, **kwargs)


def apg(model: Any) -> Any:
    """Our APG with the defaults for small latents."""
    return LodestarAPG.execute(model, eta=0.0, norm_threshold=5.0, momentum=-0.5, start_percent=0.0, end_percent=1.0).result[0]


def pag(model: Any) -> Any:
    """Our PAG in the middle block."""
    return LodestarPAG.execute(
        model, scale=3.0, layers="middle", joint_attention="masked", rescale=0.0, start_percent=0.0, end_percent=1.0
    ).result[0]


def autoguidance(model: Any, weak: Any) -> Any:
    """Our autoguidance."""
    return LodestarAutoguidance.execute(model, weak, scale=2.0, start_percent=0.0, end_percent=1.0).result[0]


def interval(model: Any) -> Any:
    """CFG in the middle three fifths of the schedule."""
    return LodestarGuidanceInterval.execute(model, start_percent=0.2, end_percent=0.8).result[0]


def host_dual_model(pair: Models) -> Any:
    """The host's autoguidance: its guider for two models, with the same prompt for both."""
    node = getattr(nodes_custom_sampler, "DualModelGuider", None)
    return node.execute(pair.main, conditioning(CAPTION), 2.0, pair.weak, conditioning(CAPTION)).result[0] if node else None


METHODS = (
    Method("conditional (cfg 1)", lambda pair: pair.main, cfg=1.0),
    Method("CFG", lambda pair: pair.main),
    Method("APG", lambda pair: apg(pair.main)),
    Method("PAG (cfg 1)", lambda pair: pag(pair.main), cfg=1.0),
    Method("CFG + PAG", lambda pair: pag(pair.main)),
    Method("APG + PAG", lambda pair: pag(apg(pair.main))),
    Method("autoguidance (cfg 1)", lambda pair: autoguidance(pair.main, pair.weak), cfg=1.0),
    Method("CFG + PAG + autoguidance", lambda pair: autoguidance(pag(pair.main), pair.weak)),
    Method("CFG in the interval 0.2 to 0.8", lambda pair: interval(pair.main)),
    Method("CFG++", lambda pair: pair.main, cfg=1.0, sampler=cfgpp_sampler("euler", 0.6)),
    Method("CFG++ at lambda 1", lambda pair: pair.main, cfg=1.0, sampler=cfgpp_sampler("euler", 1.0)),
    Method("host: APG", lambda pair: nodes_apg.APG.execute(pair.main, 1.0, 5.0, 0.0).result[0]),
    Method("host: PAG (cfg 1)", lambda pair: nodes_pag.PerturbedAttentionGuidance.execute(pair.main, 3.0).result[0], cfg=1.0),
    Method("host: CFG + PAG", lambda pair: nodes_pag.PerturbedAttentionGuidance.execute(pair.main, 3.0).result[0]),
    Method("host: DualModelGuider (cfg 2)", host_dual_model, cfg=2.0),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="sampling steps (default: 10)")
    parser.add_argument("--models", nargs="+", choices=models.MODELS, default=models.MODELS, help="which models (default: both)")
    args = parser.parse_args(argv)
    print(f"Per step, mean of {args.steps} Euler steps, batch of {BATCH}. FLOPs: 1.00 is one conditional forward pass of the batch.")
    for model in args.models:
        counts = {}
        for method in tqdm(METHODS, desc=model, unit="method", leave=False):
            count = measure(model, method, args.steps)
            if count is not None:
                counts[method.name] = count
        print(f"\n{table(model, counts, args.steps)}")
    return 0


def measure(model: str, method: Method, steps: int) -> Count | None:
    """Sample once and count; None where the host lacks the node."""
    count = Count()
    pair = Models(*(counted(models.load_model(model, strength), count) for strength in models.STRENGTHS))
    built = method.build(pair)
    if built is None:
        return None
    guider = built
    if not isinstance(built, comfy.samplers.CFGGuider):
        guider = comfy.samplers.CFGGuider(built)
        guider.set_conds(conditioning(CAPTION), conditioning(""))
        guider.set_cfg(method.cfg)
    with torch.no_grad(), counted_flops() as flops:
        count.latent = sample(guider, model, pair.main, steps, method.sampler)
    count.flops = flops.get_total_flops()
    return count


def counted(model: Any, count: Count) -> Any:
    """A clone of the MODEL whose calls are counted."""
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "cost", count.apply_model)
    return clone


def sample(guider: Any, name: str, model: Any, steps: int, sampler: Any) -> torch.Tensor:
    """Noise from the seed, then the method's sampler."""
    latent = torch.zeros(BATCH, 3, SIZE, SIZE)
    noise = comfy.sample.prepare_noise(latent, SEED)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), models.SCHEDULERS[name], steps)
    return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=SEED)


def conditioning(text: str) -> list:
    """A CONDITIONING for the demo models."""
    clip = models.load_clip()
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def table(model: str, counts: dict[str, Count], steps: int) -> str:
    """One line for each method, in Markdown."""
    names = list(counts)
    unit = counts[names[0]].flops / steps
    rows = [(model, "calls", "rows", "NFE", "FLOPs"), ("-" * 30, "----:", "----:", "----:", "----:")]
    for name, count in counts.items():
        label = name + remark(name, counts)
        rows.append((label, *(f"{value / steps:.2f}" for value in (count.calls, count.rows, count.nfe, count.flops / unit))))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join(lines)


def remark(name: str, counts: dict[str, Count]) -> str:
    """Says so where a method costs evaluations but leaves the result of its base as it is."""
    base = "conditional (cfg 1)" if "cfg 1" in name else "CFG"
    paid = counts[name].nfe > counts[base].nfe
    same = torch.allclose(counts[name].latent, counts[base].latent, atol=1e-3)  # up to the rounding of other batch sizes
    return " (no effect)" if paid and same else ""


if __name__ == "__main__":
    sys.exit(main())
