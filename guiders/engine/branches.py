"""Branches: predictions beyond the sampler's own two, evaluated with them in the fewest model calls."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Variant(Protocol):
    """A change of the network for some rows of a batch. Hashable, compared by value."""

    def patch(self, transformer_options: dict[str, Any], perturbed: Sequence[bool]) -> dict[str, Any]:
        """A copy of the options that applies the change to the chunks of the batch where ``perturbed`` is true."""
        ...

    def sharing(self, network: Any, chunks: Any, options: dict[str, Any], control: bool, measured: bool) -> Any:
        """Around one forward pass: what computes the equal beginnings of ``chunks`` once. See sharing.py; one variant asks for all."""
        ...


@dataclass(frozen=True)
class Branch:
    """The positive conditioning under a variant of the model (``variant``) or under another model (``model``, a ModelPatcher)."""

    variant: Variant | None = None
    model: Any = None


def branch_conds(conds: Sequence[dict[str, Any]], branch: Branch) -> list[dict[str, Any]]:
    """The cond list of a branch. Each entry gets a uuid of its own, because caches (EasyCache, TeaCache) are keyed by it."""
    return [{**cond, "uuid": branch_uuid(cond["uuid"], branch)} for cond in conds]


def branch_uuid(own: uuid.UUID, branch: Branch) -> uuid.UUID:
    """The uuid of a cond in the list of a branch."""
    return uuid.uuid5(own, f"lodestar {hash(branch)}")


class ControlView:
    """A ControlNet as seen from a fused batch: ``cond_or_uncond`` as it would be without us. Everything else is the ControlNet's own."""

    def __init__(self, control: Any, host_labels: Callable[[Sequence[int]], list[int]]) -> None:
        self.__dict__.update(control=control, host_labels=host_labels)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.control, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.control, name, value)

    def get_control(self, x: Any, t: Any, cond: Any, batched_number: int, transformer_options: dict[str, Any]) -> Any:
        """The host's call, with the extra branches' labels hidden."""
        options = transformer_options | {"cond_or_uncond": self.host_labels(transformer_options["cond_or_uncond"])}
        return self.control.get_control(x, t, cond, batched_number, options)

    def get_instance_for_device(self, device: Any) -> ControlView:
        """The view of its copy on another device."""
        return ControlView(self.control.get_instance_for_device(device), self.host_labels)


def with_control_views(
    lists: Sequence[list[dict[str, Any]] | None], host_labels: Callable[[Sequence[int]], list[int]]
) -> list[list[dict[str, Any]] | None]:
    """The same lists of conds with every ControlNet behind a ControlView (one view per ControlNet, so that the host still fuses them)."""
    views: dict[int, ControlView] = {}

    def view(cond: dict[str, Any]) -> dict[str, Any]:
        control = cond.get("control")
        return cond if control is None else {**cond, "control": views.setdefault(id(control), ControlView(control, host_labels))}

    return [None if conds is None else [view(cond) for cond in conds] for conds in lists]
