"""Branches: predictions beyond the sampler's own two, evaluated with them in the fewest model calls."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Variant(Protocol):
    """A change of the network for some rows of a batch. Hashable, compared by value."""

    def patch(self, transformer_options: dict[str, Any], perturbed: Sequence[bool]) -> dict[str, Any]:
        """A copy of the options that applies the change to the chunks of the batch where ``perturbed`` is true."""
        ...


@dataclass(frozen=True)
class Branch:
    """The positive conditioning under a variant of the model (``variant``) or under another model (``model``, a ModelPatcher)."""

    variant: Variant | None = None
    model: Any = None


def lane(conds: Sequence[dict[str, Any]], branch: Branch) -> list[dict[str, Any]]:
    """The cond list of a branch. Each entry gets a uuid of its own, because caches (EasyCache, TeaCache) are keyed by it."""
    tag = f"lodestar {hash(branch)}"
    return [{**cond, "uuid": uuid.uuid5(cond["uuid"], tag)} for cond in conds]


def hidden(labels: Sequence[int]) -> list[int]:
    """``cond_or_uncond`` as everybody else may see it: an extra branch counts as cond."""
    return [label if label < 2 else 0 for label in labels]


class ControlView:
    """A ControlNet as seen from a fused batch: ``cond_or_uncond`` holds 0 and 1 only. Everything else is the ControlNet's own."""

    def __init__(self, control: Any) -> None:
        self.control = control

    def __getattr__(self, name: str) -> Any:
        return getattr(self.control, name)

    def get_control(self, x: Any, t: Any, cond: Any, batched_number: int, transformer_options: dict[str, Any]) -> Any:
        """The host's call, with the extra branches' labels hidden."""
        options = transformer_options | {"cond_or_uncond": hidden(transformer_options["cond_or_uncond"])}
        return self.control.get_control(x, t, cond, batched_number, options)


def with_control_views(lanes: Sequence[list[dict[str, Any]] | None]) -> list[list[dict[str, Any]] | None]:
    """The same lanes with every ControlNet behind a ControlView (one view per ControlNet, so that the host still fuses them)."""
    views: dict[int, ControlView] = {}

    def view(cond: dict[str, Any]) -> dict[str, Any]:
        if cond.get("control") is None:
            return cond
        return {**cond, "control": views.setdefault(id(cond["control"]), ControlView(cond["control"]))}

    return [None if conds is None else [view(cond) for cond in conds] for conds in lanes]
