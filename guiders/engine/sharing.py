"""Which chunks of a forward pass are equal until a branch's change of the network, and what the report says of it.

A branch has the conds of the positive list under uuids of its own, at the same noisy point: so it is known, without a look at a tensor,
which chunks are equal. network/prefix.py computes what they share once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .branches import Branch, Variant, branch_uuid
from .keys import NARROWED, RUN, SHARED, options_of, with_options
from .run import Run

_CONTROL_INDEX = 2  # of the ControlNet's residuals among apply_model's arguments after x and t


@dataclass(frozen=True)
class Chunks:
    """The equal chunks of rows of one forward pass, of which some share their beginnings.

    branches: of each chunk; None for the host's own. names: chunks of one name differ in their branches' variants alone.
    size: rows of a chunk. replaced: ``patches_replace`` as it was before the variants' own.
    """

    branches: tuple[Branch | None, ...]
    names: tuple[Hashable, ...]
    size: int
    replaced: Mapping[str, Any]

    @property
    def variants(self) -> tuple[Variant | None, ...]:
        """Of each chunk."""
        return tuple(branch and branch.variant for branch in self.branches)


def chunks_of(run: Run, options: Mapping[str, Any], labels: Sequence[int], rows: int) -> Chunks | None:
    """The chunks of a call of the model with ``rows`` rows; None where no two are known to be equal."""
    call, narrowed = run.evaluation.call, options.get(NARROWED)
    left, uuids = narrowed if narrowed is not None else (None, options.get("uuids", ()))
    size = run.log.batch if left is None else len(left)
    if len(uuids) != len(labels) or rows != size * len(labels):  # tiles, or a part of a video
        return None
    branches = tuple(map(call.branch_of, labels))
    own = {branch_uuid(cond["uuid"], branch): cond["uuid"] for cond in run.guider.conds["positive"] for branch in call.branches}
    conds = [own.get(name) if branch else name for branch, name in zip(branches, uuids, strict=True)]
    names = tuple(zip(call.host_labels(labels), conds, strict=True))
    if None in conds or len(set(names)) == len(names) or len(set(zip(names, branches, strict=True))) < len(names):
        return None
    return Chunks(branches, names, size, options.get("patches_replace", {}))


def share(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """APPLY_MODEL wrapper inside all others, so that it sees the options as they reach the network."""
    options = options_of(args, kwargs)
    chunks: Chunks | None = options.get(SHARED)
    if chunks is None or len(x) != chunks.size * len(chunks.names):
        return executor(x, t, *args, **kwargs)
    run: Run = options[RUN]
    control = kwargs.get("control", args[_CONTROL_INDEX] if len(args) > _CONTROL_INDEX else None)
    key = chunks.branches, chunks.names, tuple(x.shape)
    variant = next(filter(None, chunks.variants))
    sharing = variant.sharing(executor.class_obj.diffusion_model, chunks, options, control is not None, key not in run.shares)
    args, kwargs = with_options(sharing.options, args, kwargs)
    with sharing:
        out = executor(x, t, *args, **kwargs)
    shares = sharing.shares()
    if shares is not None:
        run.shares[key] = shares
    run.note_shares(chunks.branches, run.shares.get(key, ()), sharing.foreign or "")
    return out
