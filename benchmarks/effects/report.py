"""The results as a terminal table, as effects.json, as a part of RESULTS.md, and as the README's sentence."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from .. import _results
from .claims import VERDICTS, Claim, Results, verdict
from .metrics import METRICS, RESAMPLES

HEAD = ("claim", "here", "against", "measure", "effect [95 %]", "")


@dataclass(frozen=True)
class Report:
    """Everything that a run found, as plain data, by method."""

    methods: dict[str, Any]

    @classmethod
    def of(cls, results: Results, methods: Mapping[str, Any]) -> Report:
        """Evaluate every method's claims and measure all its cells."""
        about = {"samples": results.cache.samples, "bootstrap resamples": RESAMPLES, "device": _device()}
        return cls({name: about | _method(method, results) for name, method in methods.items()})

    @classmethod
    def load(cls, path: Path) -> Report:
        """From effects.json."""
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """As effects.json; methods that this run left out keep what the file says of them."""
        before = Report.load(path).methods if path.exists() else {}
        path.write_text(json.dumps(dict(sorted((before | self.methods).items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def table(self) -> str:
        """For the terminal: cells, then claims, method by method."""
        return "\n".join(_text(method) for method in self.methods.values())

    def markdown(self, titles: Mapping[str, str]) -> str:
        """For RESULTS.md: method by method its picture, its claims and the likely reasons; ``titles`` of all methods there are, by name."""
        parts = [_section(name, method) for name, method in self.methods.items()]
        missing = [title for name, title in titles.items() if name not in self.methods]
        return "\n\n".join([*parts, *([f"Not measured yet: {', '.join(missing)}."] if missing else [])])

    def counts(self) -> dict[str, int]:
        """How many claims of the papers have each verdict."""
        found = [claim["verdict"] for method in self.methods.values() if method.get("of a paper", True) for claim in method["claims"]]
        return {verdict: found.count(verdict) for verdict in VERDICTS}

    def sentence(self) -> str:
        """For the README."""
        counts = self.counts()
        return (
            f"Of {sum(counts.values())} claims of the papers, tried on the two demo models, {counts['holds']} hold, {counts['fails']} fail "
            f"and {counts['undecided']} are undecided: [all of them](benchmarks/RESULTS.md#do-the-claims-hold)."
        )


def write(report: Report, titles: Mapping[str, str], results: Path = _results.RESULTS, readme: Path = _results.README) -> None:
    """Bring the documents up to date."""
    _results.write(results, "effects", report.markdown(titles))
    _results.write(readme, "effects", report.sentence())


def _section(name: str, method: Mapping[str, Any]) -> str:
    lines = [f"### {method['title']}", "", f"{method['samples']} pictures for each setting.", ""]
    lines += [f"![Curves over the scale, and first pictures of the settings](results/{name}.png)", ""]
    lines += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines += [f"| {' | '.join((*_row(claim), _mark(claim)))} |" for claim in method["claims"]]
    reasons = dict.fromkeys(claim["why"] for claim in method["claims"] if claim["verdict"] != "holds" and claim["why"])
    if reasons:
        lines += ["", "Why some do not hold here, most likely:", "", *(f"- {reason}" for reason in reasons)]
    return "\n".join(lines)


def _method(method: Any, results: Results) -> dict[str, Any]:
    cells = []
    for cell in method.cells:
        made = results.made(cell)
        values = {metric.name: asdict(results.measure(cell, metric)) for metric in METRICS}
        cells.append({"model": cell["model"], "label": cell.label, "nfe": made.nfe, "flops": made.flops, "seconds": made.seconds} | values)
    about = {} if method.of_a_paper else {"of a paper": False}
    return {"title": method.title, **about, "claims": [_claim(claim, results) for claim in method.claims(results)], "cells": cells}


def _claim(claim: Claim, results: Results) -> dict[str, Any]:
    effect = results.effect(claim)
    return {
        "claim": claim.text, "model": claim.cell["model"], "cell": claim.cell.label, "baseline": claim.baseline.label,
        "metric": claim.metric.name, "margin": claim.margin, **asdict(effect), "verdict": verdict(claim, effect), "why": claim.why,
    }  # fmt: skip


def _row(claim: Mapping[str, Any]) -> tuple[str, ...]:
    effect = f"{claim['value']:+.3f} [{claim['low']:+.3f}, {claim['high']:+.3f}]"
    measure = claim["metric"] + (f", no worse than {claim['margin']:g}" if claim["margin"] else "")
    return claim["claim"], f"{claim['model']}, {claim['cell']}", claim["baseline"], measure, effect


def _mark(claim: Mapping[str, Any]) -> str:
    return claim["verdict"] if claim["verdict"] == "holds" else f"**{claim['verdict']}**"


def _text(method: Mapping[str, Any]) -> str:
    lines = [f"\n{method['title']}", f"  {'':<28}{'NFE':>6}{'GFLOPs':>8}" + "".join(f"{metric.name:>24}" for metric in METRICS)]
    for cell in method["cells"]:
        values = "".join(f"{_short(cell[metric.name]):>24}" for metric in METRICS)
        lines.append(f"  {cell['model'] + ', ' + cell['label']:<28}{cell['nfe']:>6.1f}{cell['flops'] / 1e9:>8.2f}{values}")
    lines += [f"  {claim['verdict']:<10}{'; '.join(_row(claim))}" for claim in method["claims"]]
    return "\n".join(lines)


def _short(effect: Mapping[str, float]) -> str:
    digits = 3 if effect["value"] < 10 else 1
    return f"{effect['value']:.{digits}f} [{effect['low']:.{digits}f}, {effect['high']:.{digits}f}]"


def _device() -> str:
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU" if device.type == "cpu" else device.type
