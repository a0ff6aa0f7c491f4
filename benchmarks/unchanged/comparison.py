"""Compares two recordings bit for bit. Needs no host."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Recording:
    """tensors: by "case#number". rows: of every forward pass, by case. raised: what a refused case said. sha256: by tensor."""

    tensors: Mapping[str, Tensor]
    rows: Mapping[str, list[int]]
    raised: Mapping[str, str]
    sha256: Mapping[str, str]

    @classmethod
    def load(cls, path: Path) -> Recording:
        """From a file that record.py has written."""
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls(tensors, about["rows"], about["raised"], about["sha256"])

    def only(self, pattern: str) -> Recording:
        """The cases whose names match, as record.py's --only has it."""
        rows = {case: rows for case, rows in self.rows.items() if fnmatch(case, f"*{pattern}*")}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name.rpartition("#")[0] in rows}
        return replace(self, tensors=tensors, rows=rows)

    def tensors_of(self, case: str) -> list[str]:
        """The names of a case's tensors, in order."""
        return sorted((name for name in self.tensors if name.rpartition("#")[0] == case), key=lambda name: int(name.rpartition("#")[2]))


def differences(before: Recording, now: Recording) -> Iterator[tuple[str, str]]:
    """(case, what differs) for every case that is not as before."""
    for case in sorted({*before.rows, *now.rows}):
        text = _difference(case, before, now)
        if text:
            yield case, text


def _difference(case: str, before: Recording, now: Recording) -> str:
    for recording, when in ((before, "before"), (now, "now")):
        if case not in recording.rows:
            return f"missing {when}"
    kinds = [recording.raised.get(case, "").partition(":")[0] for recording in (before, now)]
    if kinds[0] != kinds[1]:
        return f"before: {before.raised.get(case, 'a result')}; now: {now.raised.get(case, 'a result')}"
    pairs = [recording.tensors_of(case) for recording in (before, now)]
    if pairs[0] != pairs[1]:
        return f"{len(pairs[0])} tensors before, {len(pairs[1])} now"
    largest = [text for name in pairs[0] if (text := _unequal(name, before, now))]
    if largest:
        return f"{len(largest)} of {len(pairs[0])} tensors: {largest[0]}"
    if before.rows[case] != now.rows[case]:
        return f"the same result from other forward passes: {_passes(before.rows[case])} before, {_passes(now.rows[case])} now"
    return ""


def _unequal(name: str, before: Recording, now: Recording) -> str:
    if before.sha256[name] == now.sha256[name]:
        return ""
    a, b = before.tensors[name], now.tensors[name]
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(a.shape)} {a.dtype} before, {tuple(b.shape)} {b.dtype} now"
    distance = (a.double() - b.double()).abs().max() if a.numel() else torch.zeros(())
    return f"largest difference {float(distance):.3g} of {float(a.double().abs().max()):.3g}"


def _passes(rows: list[int]) -> str:
    return f"{len(rows)} with {sum(rows)} rows"


def report(before: Recording, now: Recording) -> tuple[str, bool]:
    """What to print, and whether everything is bit-equal."""
    found = list(differences(before, now))
    cases = {*before.rows, *now.rows}
    refused = sum(case in before.raised and case in now.raised for case in cases)
    lines = [f"{case}: {text}" for case, text in found]
    lines.append(
        f"{len(cases)} cases ({len(before.tensors)} tensors), {len(cases) - len(found)} bit-equal ({refused} of them refused in both), "
        f"{len(found)} not."
    )
    return "\n".join(lines), bool(cases) and not found
