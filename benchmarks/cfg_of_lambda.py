"""What lambda of CFG++ is worth in cfg: ``python run.py bench cfg_of_lambda [--write]``.

A mean over the steps of a schedule; samples nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import comfy.samplers
from comfy.model_sampling import ModelSamplingDiscrete, ModelSamplingDiscreteFlow

from lodestar.benchmarks import _results
from lodestar.guiders.cfgpp.solvers import mean_equivalent_cfg
from lodestar.guiders.spaces import levels_of

LAMBDAS = (0.2, 0.4, 0.6, 0.8, 1.0)
STEPS = (10, 20, 30, 50)


def schedules() -> dict[str, tuple[Any, str, bool]]:
    """A model's levels, the scheduler that its users take, and whether it is a flow model, by name."""
    flow = ModelSamplingDiscreteFlow()
    flow.set_parameters(shift=3.0)
    return {"SD1.5, SDXL (normal)": (ModelSamplingDiscrete(), "normal", False), "flow models (simple)": (flow, "simple", True)}


def table() -> str:
    """One line for each schedule and number of steps, in Markdown."""
    lines = [f"| schedule | steps |{''.join(f' λ {lambda_:g} |' for lambda_ in LAMBDAS)}", f"|---|---|{'---:|' * len(LAMBDAS)}"]
    for name, (sampling, scheduler, flow) in schedules().items():
        for steps in STEPS:
            levels = levels_of(comfy.samplers.calculate_sigmas(sampling, scheduler, steps).tolist(), flow)
            lines.append(f"| {name} | {steps} |{''.join(f' {mean_equivalent_cfg(lambda_, levels):.1f} |' for lambda_ in LAMBDAS)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    _results.add_option(parser)
    args = parser.parse_args(argv)
    print(table())
    if args.write:
        _results.write(_results.RESULTS, "cfg_of_lambda", table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
