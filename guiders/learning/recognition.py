"""Recognition: the setting of a sampling call of the host, with names for its model, sampler and negative prompt that can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..spaces import is_flow
from .setting import PROJECTIONS, Setting

_SAMPLED = 64  # parameters, and values of each, that a model is recognised by


def setting_of(guider: Any, sampler: Any, sigmas: Tensor) -> Setting:
    """The setting of one sampling call of the host, with the schedule ``sigmas`` [T + 1]."""
    patcher = guider.model_patcher
    flow = is_flow(patcher.get_model_object("model_sampling"))
    return Setting(
        model=model_id(patcher),
        sampler=sampler_id(sampler),
        sigmas=tuple(sigmas.tolist()),
        cfg=float(guider.cfg),
        space="velocity" if flow else "noise",
        negative=projections(guider.original_conds.get("negative") or ()),
    )


def sampler_id(sampler: Any) -> str:
    """The name of a SAMPLER, with its options where it has any."""
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return type(sampler).__name__
    name = getattr(function, "__name__", type(function).__name__).removeprefix("sample_")
    options = getattr(sampler, "extra_options", None) or {}
    return f"{name} ({', '.join(f'{key} {options[key]}' for key in sorted(options))})" if options else name


# --- the model -------------------------------------------------------------------------------------------------------


def model_id(patcher: Any) -> str:
    """Class of the network and a hash of its configuration, of some values of some weights as loaded, and of the LoRAs on it."""
    network = patcher.model.diffusion_model
    parts = hashlib.sha256()
    weights = [(name, weight) for name, weight in network.named_parameters() if type(weight.data) is torch.Tensor]
    for name, weight in weights:
        parts.update(f"{name} {tuple(weight.shape)}".encode())
    for name, weight in weights[:: max(1, len(weights) // _SAMPLED)]:
        original = patcher.backup.get(f"diffusion_model.{name}")  # where a LoRA is worked into the weight of a loaded model
        parts.update(_sampled(weight if original is None else original.weight))
    for key in sorted(patcher.patches):
        parts.update(key.encode())
        _add(parts, patcher.patches[key])
    return f"{type(network).__name__} {parts.hexdigest()[:12]}"


def _sampled(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].float().cpu().numpy().tobytes()


def _add(parts: Any, value: Any) -> None:
    """Add a weight patch of the host to a hash: strengths and tensors, however nested."""
    if isinstance(value, Tensor):
        parts.update(_sampled(value))
    elif isinstance(value, (tuple, list)):
        for entry in value:
            _add(parts, entry)
    elif isinstance(value, (int, float, str)):
        parts.update(str(value).encode())
    elif hasattr(value, "weights"):  # the host's weight adapters
        _add(parts, value.weights)


# --- the negative prompt ---------------------------------------------------------------------------------------------


def projections(conds: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """A few fixed projections of a conditioning's text encoding and pooled vector, by which it is recognised.

    Not a hash, because encodings of one prompt differ a little from machine to machine.
    """
    tensors = [cond[name] for cond in conds for name in ("cross_attn", "pooled_output") if isinstance(cond.get(name), Tensor)]
    return tuple(value for tensor in tensors for value in _project(tensor))


def _project(tensor: Tensor) -> list[float]:
    """Root mean square, and projections on pseudo-random signs (of about that size)."""
    flat = tensor.detach().flatten().double().cpu()
    index = torch.arange(len(flat))
    signs = [((index * 2654435761 + 40503 * number * (index + 1)) >> 15 & 1) * 2 - 1 for number in range(PROJECTIONS)]
    return [float(flat.square().mean().sqrt()), *(float(flat @ sign.double() / len(flat) ** 0.5) for sign in signs)]
