"""Gradients through the host's samplers: a differentiable run needs a sampler, weights and memory that allow it.

The host samples without gradients, on weights made in inference mode. Here the sampler is the undecorated function, weights are seen
through ordinary tensors on the same memory, and every evaluation keeps its input alone (checkpointing, Chen et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

# deterministic, one function of the schedule, every operation differentiable (tests/policies/test_search.py tries each of them)
SAMPLERS = ("euler", "heun", "heunpp2", "dpm_2", "lms", "dpmpp_2m", "ipndm", "ipndm_v", "gradient_estimation")


def differentiable(sampler: Any) -> Callable[..., Tensor]:
    """The sampler's function without its ``torch.no_grad``, with its options. Raises ValueError for other samplers than SAMPLERS."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
    options = getattr(sampler, "extra_options", None) or {}
    if name not in SAMPLERS or options.get("s_churn"):
        reason = "adds noise" if options.get("s_churn") else "cannot be differentiated"
        raise ValueError(f"Guidance policy search: the sampler {name} {reason}; use one of {', '.join(SAMPLERS)}, or ddim.")
    return partial(getattr(function, "__wrapped__", function), **options)


@contextmanager
def gradients() -> Iterator[None]:
    """Nodes run in inference mode; inside, gradients are recorded all the same."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


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
    """Meanwhile, inference tensors among the parameters and buffers are ordinary tensors on the same memory, without gradients."""
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


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The modules to checkpoint: what lists of layers hold, down to modules without such lists (residual and transformer blocks)."""
    for child in network.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) or any(isinstance(part, nn.ModuleList) for part in child.modules()):
            yield from blocks(child)
        elif next(child.children(), None) is not None:
            yield child


@contextmanager
def checkpointed(network: nn.Module) -> Iterator[None]:
    """Meanwhile, the network's blocks keep their inputs alone and run again in the backward pass."""
    with ExitStack() as stack:
        for block in list(blocks(network)):
            own = block.__dict__.get("forward")  # a pack's replacement
            block.forward = partial(_again, block.forward)
            stack.callback(_restore, block, own)
        yield


def _restore(block: nn.Module, own: Callable | None) -> None:
    if own is None:
        del block.forward
    else:
        block.forward = own


def _again(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    """A checkpoint of one block. The host goes on writing into its options, so that the second run needs those of the first."""

    def run(*inputs: Any) -> Any:
        options = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
        return forward(*(dict(value) if isinstance(value, dict) else value for value in inputs), **options)

    kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
    args = tuple(dict(value) if isinstance(value, dict) else value for value in args)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def once_more(function: Callable[..., Any], *args: Any) -> Any:
    """A checkpoint of a whole evaluation by the host. It runs to its end again: the host must not be left in the middle of one."""
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
