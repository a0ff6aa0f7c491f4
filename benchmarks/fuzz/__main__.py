"""Random graphs of our nodes and the host's: ``run.py bench fuzz [--graphs N] [--seed S] [--processes P] [--graph SEED]``.

Each must end with a finite latent, or one sentence of ours, or the host's own error that it raises without us as well; a second run
is bit-equal, nothing is left on the model, the report counts what the networks saw, and a neutral rule changes no bit. Every failure
is printed with the option that runs its graph again. ``--graph`` shows one, and what is left of it when all that does not matter is
taken away.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

from lodestar.benchmarks import _tiny
from lodestar.benchmarks.fuzz.checks import FAILED, HOST, OK, REFUSED, Outcome, checked, outcome
from lodestar.benchmarks.fuzz.choices import Graph, random_graph

PER_SEED = 1_000_000  # graphs
LONGEST = 60  # seconds of a graph


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=300, metavar="N", help="how many (default: 300)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other graphs (default: 0)")
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="how many at a time (default: 1)")
    parser.add_argument("--graph", type=int, metavar="SEED", help="one graph alone, and its smallest part that fails in the same way")
    args = parser.parse_args()
    _tiny.prepare()
    warnings.simplefilter("ignore")
    if args.graph is not None:
        return one(random_graph(args.graph))
    began = time.perf_counter()
    outcomes: list[Outcome] = []
    first = args.seed * PER_SEED
    for result in run(range(first, first + args.graphs), args.processes):
        outcomes.append(result)
        if result.kind == FAILED:
            print(f"--graph {result.seed}: {result.text}\n    {random_graph(result.seed)}", flush=True)
    print(summary(outcomes, time.perf_counter() - began))
    return 1 if any(result.kind == FAILED for result in outcomes) else 0


def run(seeds: Sequence[int], processes: int) -> Iterator[Outcome]:
    """The outcomes of many graphs, as they come."""
    if processes == 1:
        yield from map(limited, seeds)
        return
    with get_context("fork").Pool(processes) as pool:
        yield from pool.imap_unordered(limited, seeds, chunksize=4)


def limited(seed: int) -> Outcome:
    """The outcome of a graph, which fails when it takes too long."""
    if not hasattr(signal, "SIGALRM"):
        return checked(seed)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LONGEST)
    try:
        return checked(seed)
    finally:
        signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"longer than {LONGEST} s")


def summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    """Figures: graphs, refusals by kind, failures, time."""
    kinds = Counter(result.kind for result in outcomes)
    lines = []
    for kind, title in ((REFUSED, "refused in one sentence of ours"), (HOST, "refused by the host, also without us"), (FAILED, "FAILED")):
        lines.append(f"{title}: {kinds[kind]}")
        sentences = Counter(beginning(result.text) for result in outcomes if result.kind == kind)
        lines += [f"{count:6}  {text}" for text, count in sentences.most_common()]
    speed = len(outcomes) / max(seconds, 1e-9)
    lines.append(f"{len(outcomes)} graphs, {kinds[OK]} sampled, {kinds[FAILED]} failures, {seconds:.0f} s ({speed:.1f} per second)")
    return "\n".join(lines)


def beginning(text: str) -> str:
    """The first words of a sentence, its numbers left out, by which alike ones are counted together."""
    return " ".join(re.sub(r"\d+(\.\d+)?", "#", text).split()[:12])


def one(graph: Graph) -> int:
    """Show a graph, and the smallest part of it that fails alike."""
    result = outcome(graph)
    print(f"{graph}\n{result.kind} in {result.seconds:.2f} s: {result.text}")
    if result.kind != FAILED:
        return 0
    small = smallest(graph, result.text)
    print(f"smallest: {small}")
    return 1


def smallest(graph: Graph, text: str) -> Graph:
    """Take parts away for as long as the same check fails."""
    wanted = beginning(text)
    shrunk = True
    while shrunk:
        shrunk = False
        for smaller in parts(graph):
            result = outcome(smaller)
            if result.kind == FAILED and beginning(result.text) == wanted:
                graph, shrunk = smaller, True
                break
    return graph


def parts(graph: Graph) -> Iterator[Graph]:
    """The graph with one thing less."""
    for field in ("chain", "positive", "negative"):
        pieces = getattr(graph, field)
        for i in range(len(pieces)):
            yield replace(graph, **{field: (*pieces[:i], *pieces[i + 1 :])})
    for name in ("mask", "filled", "batch_index"):
        if name in graph.latent and not (name == "filled" and "mask" in graph.latent):
            yield replace(graph, latent={key: value for key, value in graph.latent.items() if key != name})
    if graph.latent["batch"] > 1 and graph.kind != "svd":
        yield replace(graph, latent={**graph.latent, "batch": 1})
    name, inputs = graph.sampling
    if inputs["sampler_name"] != "euler":
        yield replace(graph, sampling=(name, {**inputs, "sampler_name": "euler"}))
    if name != "KSampler":
        kept = {key: inputs[key] for key in ("sampler_name", "scheduler", "steps", "cfg", "seed", "denoise") if key in inputs}
        yield replace(graph, sampling=("KSampler", kept))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        traceback.print_exc(limit=0)
        sys.exit(130)
