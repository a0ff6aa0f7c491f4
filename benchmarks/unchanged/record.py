"""Samples all cases and writes what came out: ``run.py python record.py OUT.safetensors WORKFLOWS [--only PATTERN]``.

It knows the pack by its node ids alone, so that it runs in other revisions of it as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import _tiny
import cases
import safetensors.torch
import templates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("workflows", type=Path)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    _tiny.prepare()
    latents: list[Tensor] = []
    templates.recorded_latents(lambda latent: latents.append(latent))
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {"raised": {}, "rows": {}, "seconds": {}}
    for name, case in (cases.cases() | templates.cases(args.workflows)).items():
        if not fnmatch(name, f"*{args.only}*"):
            continue
        latents.clear()
        began = time.perf_counter()
        with _tiny.counted(*(_tiny.tiny(kind, seed) for kind in _tiny.KINDS for seed in (0, 7))) as rows, torch.inference_mode():
            try:
                result = case()
            except Exception as error:  # a refusal is a result too
                about["raised"][name] = f"{type(error).__name__}: {error}"
                result = None
        about["rows"][name] = rows
        about["seconds"][name] = round(time.perf_counter() - began, 3)
        print(f"{about['seconds'][name]:7.2f} s  {name}  {about['raised'].get(name, '')}", flush=True)
        for i, tensor in enumerate([*leaves(result), *leaves(latents)]):
            tensors[f"{name}#{i}"] = tensor
    about["sha256"] = {name: digest(tensor) for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, args.out, {"about": json.dumps(about)})


def leaves(result: Any) -> Iterable[Tensor]:
    """The tensors in a result; bytes count as one."""
    if isinstance(result, bytes):
        yield torch.frombuffer(bytearray(result), dtype=torch.uint8)
    elif isinstance(result, (list, tuple)):
        for one in result:
            yield from leaves(one)
    elif isinstance(result, Tensor):
        for tensor in result.unbind() if result.is_nested else [result]:
            yield tensor.detach().cpu().clone().contiguous()


def digest(tensor: Tensor) -> str:
    """SHA-256 of shape, type and values."""
    parts = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    parts.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return parts.hexdigest()


if __name__ == "__main__":
    main()
