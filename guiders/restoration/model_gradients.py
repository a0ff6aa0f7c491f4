"""The conditional prediction once more, with gradients with respect to the noisy point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..engine.compiling import uncompiled
from ..engine.step import Point
from ..learning.checkpoints import checkpointed
from ..learning.gradients import cloned, gradients, ordinary_weights, training_kernels


@contextmanager
def estimate_with_gradients(point: Point) -> Iterator[tuple[Tensor, Tensor]]:
    """x [B, ...], and D_c [B, ...] as a function of it. Blocks of the network keep only their inputs, and run again on the way back."""
    conds = point.conds
    with ExitStack() as stack:
        stack.enter_context(gradients())
        stack.enter_context(training_kernels())
        stack.enter_context(uncompiled())
        for network in [point.model, *_control_networks(conds)]:
            stack.enter_context(ordinary_weights(network))
        stack.enter_context(checkpointed(point.model.diffusion_model, written=any("control" in cond for cond in conds)))
        x = point.x.detach().clone().requires_grad_()
        yield x, point.evaluate(list(map(_ordinary, conds)), x, point.sigma.clone())


def _ordinary(cond: dict[str, Any]) -> dict[str, Any]:
    """A cond whose tensors autograd can save."""
    return {name: _of_model(value) if name == "model_conds" else value for name, value in cond.items()}


def _of_model(conds: dict[str, Any]) -> dict[str, Any]:
    return {name: value._copy_with(cloned(value.cond)) for name, value in conds.items()}


def _control_networks(conds: Sequence[dict[str, Any]]) -> list[nn.Module]:
    """The ControlNets, each once, with those that they are chained to."""
    found: dict[int, nn.Module] = {}
    for cond in conds:
        control = cond.get("control")
        while control is not None:
            network = getattr(control, "control_model", None)
            if isinstance(network, nn.Module):
                found[id(network)] = network
            control = getattr(control, "previous_controlnet", None)
    return list(found.values())
