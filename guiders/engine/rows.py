"""Model calls: what is counted, which rows of the batch go through the model, and what other packs see of extra branches.

The host prepares its fused batch for all rows: conditioning, areas, masks, ControlNets. Rows whose result nobody needs are left out
here, around the model. Other packs' patches count on chunks of equal size (``len(x) // len(cond_or_uncond)``), so
chunks with different rows go through the model one after the other, and the rows in total are the rows that are needed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import comfy.conds
import torch
from torch import Tensor

from ..spaces import on_device_of
from .choice import Rows
from .compiling import uncompiled
from .keys import AROUND, LABELS, LODESTAR, NARROWED, RUN, SHARED, options_of, with_options
from .run import Run
from .sharing import chunks_of

Groups = list[tuple[list[int], list[int]]]  # chunks of a batch, and the rows that they need


def outermost(wrappers: dict[str, list], ours: list) -> dict[str, list]:
    """Wrappers of one kind with ours around the others: rows are still the sampler's there, and the others see no row that is left out."""
    return {LODESTAR: ours} | {key: others for key, others in wrappers.items() if key != LODESTAR}


def apply_model(executor: Callable, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """APPLY_MODEL wrapper: leaves out rows, counts, applies variants to the rows of their branches."""
    options = options_of(args, kwargs)
    run = options.get(RUN)
    if run is None:  # called outside of a sampling run
        return executor(x, t, *args, **kwargs)
    labels = _labels(options)
    groups = None if _whole(options) else _groups([run.evaluation.call.rows_of(label) for label in labels], len(x) / len(labels))
    if groups is not None:
        return _in_parts(run, executor, groups, x, t, args, kwargs)
    run.count(len(x), len(labels))
    return _with_variants(run, executor, x, t, options, args, kwargs)


def _with_variants(
    run: Run, executor: Callable, x: Tensor, t: Tensor, options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """One model call, with each branch's change of the network in its own chunks."""
    labels = _labels(options)
    branches = [run.evaluation.call.branch_of(label) for label in labels]
    variants = dict.fromkeys(branch.variant for branch in branches if branch is not None)
    shared = chunks_of(run, options, labels, len(x)) if variants else None
    options = options | {SHARED: shared} if shared is not None else options
    for variant in variants:
        options = variant.patch(options, [branch is not None and branch.variant == variant for branch in branches])
    args, kwargs = with_options(options, args, kwargs)
    with ExitStack() as stack:
        if variants:
            stack.enter_context(uncompiled())
        for around in options.get(AROUND, ()):
            stack.enter_context(around(executor.class_obj.diffusion_model))
        return executor(x, t, *args, **kwargs)


def _in_parts(run: Run, executor: Callable, groups: Groups, x: Tensor, t: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """One model call for each group of chunks that need the same rows. The rows that nobody needs are zeros."""
    options, constant, out = options_of(args, kwargs), _constants(run), None
    batch = len(x) // len(_labels(options))
    for chunks, rows in groups:
        indices = [batch * chunk + row for chunk in chunks for row in rows]
        run.count(len(indices), len(indices) / batch)
        take = _Selection(len(x), on_device_of(x, indices))
        named = {name: value if name in constant else take(value) for name, value in kwargs.items()}
        narrowed = _narrowed(options, chunks, rows, batch)
        part = _with_variants(run, executor, take(x), take(t), narrowed, tuple(take(arg) for arg in args), named)
        out = part.new_zeros(len(x), *part.shape[1:]) if out is None else out
        out[take.indices] = part
    return out


def _labels(options: dict[str, Any]) -> list[int]:
    """The number of each chunk's list of conds, ours included."""
    return options.get(LABELS, options["cond_or_uncond"])


def _groups(needed: list[Rows], batch: float) -> Groups | None:
    """Chunks that need the same rows, with these rows; None where every chunk needs all of them.

    Also None where the batch has been regrouped on the way here (tiles), so that a chunk's rows are not the sampler's: then all are
    evaluated, and the ones that were not needed are replaced afterwards.
    """
    partial = [rows for rows in needed if not isinstance(rows, bool)]
    if not partial or any(len(rows) != batch for rows in partial):
        return None
    groups: dict[tuple[int, ...], list[int]] = {}
    for chunk, rows in enumerate(needed):
        every = range(int(batch)) if isinstance(rows, bool) else (i for i, wanted in enumerate(rows) if wanted)
        groups.setdefault(tuple(every), []).append(chunk)
    return [(chunks, list(rows)) for rows, chunks in groups.items()]


def _whole(options: dict[str, Any]) -> bool:
    """Whether a patch of another pack counts on all rows of a chunk, beyond what can be narrowed.

    GLIGEN holds a tensor with one row for each of them. A replaced self-attention may keep its maps for later: Self-Attention Guidance.
    """
    return bool(options.get("patches", {}).get("middle_patch") or options.get("patches_replace", {}).get("attn1"))


class _Selection:
    """Takes some entries out of everything that has one for each of ``size`` rows, and leaves the rest as it is."""

    def __init__(self, size: int, indices: Tensor) -> None:
        self.size, self.indices = size, indices

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            own = value.ndim > 0 and len(value) == self.size
            return value[self.indices.to(value.device)] if own else value
        if isinstance(value, dict) and RUN not in value:  # transformer_options are narrowed apart
            return {name: self(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self(part) for part in value]
        return value


def _constants(run: Run) -> set[str]:
    """Names of conditioning that is the same for all rows, whatever its shape."""
    lists: Iterable[list[dict[str, Any]]] = [*run.guider.conds.values(), *(weak.conds for weak in run.weak_models.values())]
    values = (item for conds in lists for cond in conds for item in cond.get("model_conds", {}).items())
    return {name for name, value in values if isinstance(value, comfy.conds.CONDConstant)}


def _narrowed(options: dict[str, Any], chunks: list[int], rows: list[int], batch: int) -> dict[str, Any]:
    """transformer_options of some chunks and rows. Caches are keyed by uuid and hold whole chunks, so that fewer rows get another one."""
    narrow = options | {name: [options[name][i] for i in chunks] for name in ("cond_or_uncond", LABELS) if name in options}
    if "uuids" in options:
        tag = f"lodestar rows {rows}"
        uuids = [options["uuids"][i] for i in chunks]
        narrow[NARROWED] = (None if len(rows) == batch else rows), uuids
        narrow["uuids"] = uuids if len(rows) == batch else [uuid.uuid5(name, tag) for name in uuids]
    if isinstance(options.get("sigmas"), Tensor) and len(options["sigmas"]) == batch:
        narrow["sigmas"] = options["sigmas"][on_device_of(options["sigmas"], rows)]
    return narrow


def with_host_labels(run: Run, function: Callable, apply: Callable, arguments: dict[str, Any]) -> Tensor:
    """The host's slot around apply_model: from here inwards nobody sees the labels of extra branches."""
    labels = run.evaluation.call.host_labels(arguments["cond_or_uncond"])
    both = {LABELS: arguments["cond_or_uncond"], "cond_or_uncond": labels}
    options = arguments["c"]["transformer_options"] | both
    return function(apply, arguments | {"cond_or_uncond": labels, "c": arguments["c"] | {"transformer_options": options}})


def call_model(apply: Callable, arguments: dict[str, Any]) -> Tensor:
    """What the host does where nobody has claimed that slot."""
    return apply(arguments["input"], arguments["timestep"], **arguments["c"])


def replace_rows(prediction: Tensor, rows: Rows, others: Tensor) -> Tensor:
    """``prediction`` [B, ...] with the rows that are not among ``rows`` taken from ``others``; a new tensor unless all are."""
    if rows is True:
        return prediction
    if rows is False:
        return others.clone()
    mask = on_device_of(prediction, rows).reshape(-1, *[1] * (prediction.ndim - 1))
    return torch.where(mask, prediction, others)
