"""Checkpoints: only inputs are kept for the backward pass, and all else is computed again. Chen et al. 2016, arXiv 1604.06174."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The modules to checkpoint: what lists of layers hold, down to modules without such lists (residual and transformer blocks)."""
    for child in network.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) or any(isinstance(part, nn.ModuleList) for part in child.modules()):
            yield from blocks(child)
        elif next(child.children(), None) is not None:
            yield child


@contextmanager
def checkpointed(network: nn.Module, written: bool = False) -> Iterator[None]:
    """Inside, the network's blocks keep only their inputs and run again in the backward pass.

    written: whether these may be written into after their block has run, as the host adds a ControlNet's output; then copies are kept.
    """
    with ExitStack() as stack:
        for block in list(blocks(network)):
            own = block.__dict__.get("forward")  # a pack's replacement
            block.forward = partial(_again, block.forward, written)
            stack.callback(_restore, block, own)
        yield


def _restore(block: nn.Module, own: Callable | None) -> None:
    if own is None:
        del block.forward
    else:
        block.forward = own


def _again(forward: Callable, written: bool, *args: Any, **kwargs: Any) -> Any:
    """A checkpoint of one block, whose second run gets what the first one got.

    So each run gets copies: the host goes on writing into its options, and Flux's blocks write into the tensors that they are given.
    """

    def run(*inputs: Any) -> Any:
        return forward(*map(_copied, inputs), **{key: _copied(value) for key, value in kwargs.items()})

    kwargs = {key: _kept(value) for key, value in kwargs.items()}
    return checkpoint(run, *map(_copied if written else _kept, args), use_reentrant=False, preserve_rng_state=False)


def _kept(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else _kept(value)


def checkpointed_call(function: Callable[..., Any], *args: Any) -> Any:
    """A checkpoint of one evaluation by the host. The second run goes to its end too: the host must not be left in the middle."""
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
