"""What guidance costs: ``python run.py bench cost [--steps N] [--batch N] [--time] [--write]``.

For each method: model calls, rows and evaluations (NFE) of a step, and counted floating-point operations relative to one
conditional forward pass. Counted, not timed, so that every machine prints the same. Ours and the host's own nodes are counted
by the same wrapper in the same run. ``--time`` adds each run's processor time on one core, as a multiple of half the time of a run of
CFG right before it: what NFE would be if time followed it. The demo models are so small that much of a call's time does not depend on
the number of rows; with ``--batch 16`` or more it does.

"shapes" are large networks, of which one step of CFG with PAG is counted from shapes alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_apg, nodes_custom_sampler, nodes_pag
from tqdm import tqdm

from lodestar.benchmarks import _results, _shapes
from lodestar.benchmarks._flops import counted_flops
from lodestar.benchmarks._sampling import conditioning, empty
from lodestar.demo import models
from lodestar.guiders.cfgpp.sampler import cfgpp_sampler
from lodestar.guiders.learning.recognition import setting_of
from lodestar.guiders.learning.setting import Setting
from lodestar.guiders.policies.linear_ag.coefficients import Coefficients
from lodestar.guiders.policies.linear_ag.regression import replaced_steps, shifted
from lodestar.guiders.policies.weights_per_step import StepWeights
from lodestar.nodes.policies.adaptive import LodestarAdaptiveGuidance
from lodestar.nodes.policies.guidance_policy import LodestarGuidancePolicy
from lodestar.nodes.policies.interval import LodestarGuidanceInterval
from lodestar.nodes.policies.linear_ag import LodestarLinearAG
from lodestar.nodes.shapers.apg import LodestarAPG
from lodestar.nodes.terms.autoguidance import LodestarAutoguidance
from lodestar.nodes.terms.pag import LodestarPAG

CAPTION = "a large purple pentagon on a cream background"
CFG, SEED = 4.0, 7
RUNS = 5  # of a method and of CFG in turns; the median of their ratios is the time


class Models(NamedTuple):
    """The two MODELs that methods are made of, counted alike."""

    main: Any
    weak: Any
    sigmas: torch.Tensor


class Method(NamedTuple):
    """A method by name, the MODEL or GUIDER its nodes make, and the sampler's cfg."""

    name: str
    build: Callable[[Models], Any]
    cfg: float = CFG
    sampler: Any = comfy.samplers.sampler_object("euler")


@dataclass
class Count:
    """Counters of one sampling run of ``batch`` pictures; ``latent`` is its result."""

    batch: int
    calls: int = 0
    rows: int = 0
    nfe: float = 0
    flops: int = 0
    time: float = 0.0
    latent: torch.Tensor | None = None

    def apply_model(self, executor: Any, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A wrapper around the model that counts its calls."""
        self.calls += 1
        self.rows += len(x)
        self.nfe += len(x) / self.batch
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


def adaptive(model: Any, threshold: float) -> Any:
    """Our Adaptive Guidance."""
    return LodestarAdaptiveGuidance.execute(model, threshold=threshold, space="denoised", switch="next_step").result[0]


def setting(pair: Models) -> Setting:
    """What coefficients and policies have to be made for, to be accepted in this benchmark."""
    guider = comfy.samplers.CFGGuider(pair.main)
    guider.set_conds(conditioning(CAPTION), conditioning(""))
    guider.set_cfg(CFG)
    return setting_of(guider, comfy.samplers.sampler_object("euler"), pair.sigmas)


def linear_ag(pair: Models) -> Any:
    """Our LinearAG. Its cost does not depend on the coefficients' values."""
    coefficients = Coefficients(setting(pair), {k: shifted(k) for k in replaced_steps(len(pair.sigmas) - 1)}, {}, 0)
    return LodestarLinearAG.execute(pair.main, coefficients=coefficients).result[0]


def policy(pair: Models) -> Any:
    """A policy like the paper's: CFG in the first half, one step in four unconditional in the second, otherwise conditional."""
    steps = len(pair.sigmas) - 1
    weights = [CFG] * (steps // 2) + [float(i % 4 > 0) for i in range(steps - steps // 2)]
    return LodestarGuidancePolicy.execute(pair.main, StepWeights(setting(pair), tuple(weights))).result[0]


def host_dual_model(pair: Models) -> Any:
    """The host's autoguidance: its guider for two models, with the same prompt for both."""
    node = getattr(nodes_custom_sampler, "DualModelGuider", None)
    return node.execute(pair.main, conditioning(CAPTION), 2.0, pair.weak, conditioning(CAPTION)).result[0] if node else None


PLAIN = Method("CFG", lambda pair: pair.main)
METHODS = (
    Method("conditional (cfg 1)", lambda pair: pair.main, cfg=1.0),
    PLAIN,
    Method("APG", lambda pair: apg(pair.main)),
    Method("PAG (cfg 1)", lambda pair: pag(pair.main), cfg=1.0),
    Method("CFG + PAG", lambda pair: pag(pair.main)),
    Method("APG + PAG", lambda pair: pag(apg(pair.main))),
    Method("autoguidance (cfg 1)", lambda pair: autoguidance(pair.main, pair.weak), cfg=1.0),
    Method("CFG + PAG + autoguidance", lambda pair: autoguidance(pag(pair.main), pair.weak)),
    Method("CFG in the interval 0.2 to 0.8", lambda pair: interval(pair.main)),
    Method("AG, threshold 0.99", lambda pair: adaptive(pair.main, 0.99)),
    Method("AG, threshold 0.998", lambda pair: adaptive(pair.main, 0.998)),
    Method("LinearAG", linear_ag),
    Method("a policy: CFG in half of the steps", policy),
    Method("CFG++", lambda pair: pair.main, cfg=1.0, sampler=cfgpp_sampler("euler", 0.6)),
    Method("CFG++ at lambda 1", lambda pair: pair.main, cfg=1.0, sampler=cfgpp_sampler("euler", 1.0)),
    Method("host: APG", lambda pair: nodes_apg.APG.execute(pair.main, 1.0, 5.0, 0.0).result[0]),
    Method("host: PAG (cfg 1)", lambda pair: nodes_pag.PerturbedAttentionGuidance.execute(pair.main, 3.0).result[0], cfg=1.0),
    Method("host: CFG + PAG", lambda pair: nodes_pag.PerturbedAttentionGuidance.execute(pair.main, 3.0).result[0]),
    Method("host: DualModelGuider (cfg 2)", host_dual_model, cfg=2.0),
)

SHORT = {  # the README's rows
    "plain CFG": "CFG",
    "APG": "APG",
    "CFG and PAG": "CFG + PAG",
    "autoguidance instead of CFG, with a small weak model": "autoguidance (cfg 1)",
    "Adaptive Guidance, `threshold` 0.998": "AG, threshold 0.998",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="sampling steps (default: 20)")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="pictures at once (default: 2)")
    choices = (*models.MODELS, "shapes")
    parser.add_argument("--models", nargs="+", choices=choices, default=choices, help="which models (default: all)")
    parser.add_argument("--time", action="store_true", help="also processor time (takes several times as long)")
    _results.add_option(parser)
    args = parser.parse_args(argv)
    write = _results.is_wanted(parser, args)
    if args.time:
        torch.set_num_threads(1)
    about = f"Per step, mean of {args.steps} Euler steps, batch of {args.batch}. FLOPs: 1.00 is one conditional forward pass of the batch."
    print(about)
    tables, found = [about], {}
    for model in (model for model in args.models if model != "shapes"):
        methods = tqdm(METHODS, desc=model, unit="method", leave=False)
        counts = {method.name: measure(model, method, args.steps, args.batch, args.time) for method in methods}
        found[model] = {name: count for name, count in counts.items() if count is not None}
        tables.append(table(model, found[model], args.steps))
        print(f"\n{tables[-1]}")
    if "shapes" in args.models:
        tables.append(_shapes.table())
        print(f"\n{tables[-1]}")
    if write:
        _results.write(_results.RESULTS, "cost", "\n\n".join(tables))
        _results.write(_results.README, "cost", f"{short_table(found)}\n\n{_shapes.sentence()}")
    return 0


def measure(model: str, method: Method, steps: int, batch: int = 2, timed: bool = False) -> Count | None:
    """Sample once and count, then again for the time; None where the host lacks the node."""
    count = Count(batch)
    main, weak = (counted(models.load_model(model, strength), count) for strength in models.STRENGTHS)
    pair = Models(main, weak, schedule(model, main, steps))
    guider = guider_of(method, pair)
    if guider is None:
        return None
    with torch.no_grad(), counted_flops() as flops:
        count.latent = sample(guider, pair.sigmas, method.sampler, batch)
    counters = replace(count, flops=flops.get_total_flops())
    if timed:
        plain = guider_of(PLAIN, pair)
        pairs = ((plain, PLAIN.sampler), (guider, method.sampler))
        runs = [[seconds(each, pair.sigmas, sampler, batch) for each, sampler in pairs] for _ in range(RUNS)]
        counters.time = median(2 * ours / cfg for cfg, ours in runs)
    return counters


def guider_of(method: Method, pair: Models) -> Any:
    """The method's GUIDER, with prompts and cfg; None where the host lacks the node."""
    built = method.build(pair)
    if built is None or isinstance(built, comfy.samplers.CFGGuider):
        return built
    guider = comfy.samplers.CFGGuider(built)
    guider.set_conds(conditioning(CAPTION), conditioning(""))
    guider.set_cfg(method.cfg)
    return guider


@torch.no_grad()
def seconds(guider: Any, sigmas: torch.Tensor, sampler: Any, batch: int) -> float:
    """Processor time of one run, which other programs on the machine change less than the time on the clock."""
    began = time.process_time()
    sample(guider, sigmas, sampler, batch)
    return time.process_time() - began


def schedule(name: str, model: Any, steps: int) -> torch.Tensor:
    """The demo model's usual schedule."""
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), models.SCHEDULERS[name], steps)


def counted(model: Any, count: Count) -> Any:
    """A clone of the MODEL whose calls are counted."""
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "cost", count.apply_model)
    return clone


def sample(guider: Any, sigmas: torch.Tensor, sampler: Any, batch: int) -> torch.Tensor:
    """Noise from the seed, then the method's sampler."""
    latent = empty(batch)
    noise = comfy.sample.prepare_noise(latent, SEED)
    return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=SEED)


def table(model: str, counts: dict[str, Count], steps: int) -> str:
    """One line for each method, in Markdown."""
    names = list(counts)
    unit = counts[names[0]].flops / steps
    timed = counts["CFG"].time > 0
    rows = [(model, "calls", "rows", "NFE", "FLOPs", *(["time"] if timed else [])), ("-" * 30, *["----:"] * (5 if timed else 4))]
    for name, count in counts.items():
        label = name + remark(name, counts)
        values = [value / steps for value in (count.calls, count.rows, count.nfe, count.flops / unit)]
        if timed:
            values.append(count.time)
        rows.append((label, *(f"{value:.2f}" for value in values)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join(lines)


def short_table(found: dict[str, dict[str, Count]]) -> str:
    """For the README: a few methods, and all models in one table, in Markdown."""
    lines = ["| with | evaluations per step |" + "".join(f" work, {model} |" for model in found), "|---|---|" + "---|" * len(found)]
    for label, name in SHORT.items():
        pairs = [(counts[name], counts[PLAIN.name]) for counts in found.values()]
        evaluations = " or ".join(dict.fromkeys(f"{2 * count.nfe / plain.nfe:.3g}" for count, plain in pairs))
        work = "".join(f" {count.flops / plain.flops:.0%} |" for count, plain in pairs)
        lines.append(f"| {label} | {evaluations} |{work}")
    return "\n".join(lines)


def remark(name: str, counts: dict[str, Count]) -> str:
    """Says so where a method costs evaluations but leaves the result of its base as it is."""
    base = METHODS[0].name if "cfg 1" in name else PLAIN.name
    paid = counts[name].nfe > counts[base].nfe
    same = torch.allclose(counts[name].latent, counts[base].latent, atol=1e-3)  # up to the rounding of other batch sizes
    return " (no effect)" if paid and same else ""


if __name__ == "__main__":
    sys.exit(main())
