"""Gradients where the host has none: it samples without them, on weights and conditionings that were made in inference mode.

Autograd cannot save inference tensors. Weights are seen through ordinary tensors on the same memory, all other inputs are copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def gradients() -> Iterator[None]:
    """Nodes run in inference mode; inside, gradients are recorded all the same."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def training_kernels() -> Iterator[None]:
    """Inside, the host uses rotary embeddings and norms that have gradients, as when it trains, in place of fused ones that have none."""
    import comfy.model_management as management  # here, because the rest needs no host

    before = getattr(management, "in_training", False)
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before


def cloned(value: Any) -> Any:
    """A copy of nested lists, tuples and dicts with every tensor cloned, because autograd cannot save inference tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: cloned(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cloned(entry) for entry in value)
    return value


@contextmanager
def ordinary_weights(network: nn.Module) -> Iterator[None]:
    """Inside, inference tensors among the parameters and buffers are ordinary tensors on the same memory, without gradients."""
    saved: list[tuple[dict, str, Tensor]] = []
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad and not parameter.is_inference()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for module in network.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference() and type(tensor) in (Tensor, nn.Parameter):
                        saved.append((tensors, name, tensor))
                        tensors[name] = _alias(tensor)
        yield
    finally:
        for tensors, name, tensor in saved:
            tensors[name] = tensor
        for parameter in trained:
            parameter.requires_grad_(True)


def _alias(tensor: Tensor) -> Tensor:
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias
