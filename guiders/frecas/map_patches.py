"""How maps get into the host's models: collected in the last evaluation of a stage, mixed into every one of the next. See maps.py.

Where a policy leaves branches out, each row's maps come from the last step in which it was evaluated.

Nothing here changes a module or a model: layers are reached through the options that travel with one forward pass.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..engine.branches import branch_uuid
from ..engine.compiling import uncompiled
from ..engine.keys import MAPS, NARROWED, RUN, options_of, with_options
from ..engine.plan import plan_of
from ..network.calls import Call, chunks_left, ordinary_attention
from ..network.layers import cross_attention_blocks, joint_patch_size
from ..spaces import on_device_of
from .maps import Maps, attention_map, map_by_head


def with_maps(model: Any, weight: float, use: Maps | None, collect: Maps | None, area: float = 1.0) -> Any:
    """A clone that mixes the maps in ``use`` into attention and collects into ``collect``; the model itself if it has none to do.

    area: how many times the first stage's pixels this stage has. UNets and SD3's transformer: other models have no attention of
    pictures to a text for which the authors have a rule.
    """
    network = model.get_model_object("diffusion_model")
    blocks, patch = cross_attention_blocks(network), joint_patch_size(network)
    if weight == 0 or not (blocks or patch) or (use is None and collect is None):
        return model
    patched = partial(_in_unet, blocks, weight) if blocks else partial(_in_joint, patch, weight, area)
    reuse = _Reuse(use, collect, patched)
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, MAPS, reuse.outer_sample)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, MAPS, reuse.apply_model)
    return clone


# --- the wrappers of a stage -----------------------------------------------------------------------------------------


class _Reuse:
    """The wrappers of one stage. What they know of its run is dropped when that ends."""

    def __init__(self, use: Maps | None, collect: Maps | None, patch: Callable[[dict[str, Any], Chunks, Tensor], dict[str, Any]]) -> None:
        self.use, self.collect, self.patch = use, collect, patch
        self.keys: dict[uuid.UUID, Hashable] = {}
        self.own: set[uuid.UUID] = set()
        self.mixed = use

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Note the index of each cond in the guider's lists: their uuids are new in every run."""
        guider = executor.class_obj
        branches = {branch for rule in plan_of(guider.model_options).rules for branch in rule.branches}
        for name, conds in guider.original_conds.items():
            for index, cond in enumerate(conds):
                self.own.add(cond["uuid"])
                for entry in (cond["uuid"], *(branch_uuid(cond["uuid"], branch) for branch in branches)):
                    self.keys[entry] = name, index
        self.mixed = None if self.use is None or self._one_sided(guider) else self.use
        try:
            return executor(*args, **kwargs)
        finally:
            self.keys.clear()
            self.own.clear()

    def _one_sided(self, guider: Any) -> bool:
        """Whether the run is guided, and the stage before never evaluated one of its two branches (a guidance interval did that).

        With the maps in one branch alone, D_c - D_u would show what the maps do, and guidance would enlarge it.
        """
        names = {index[0] for _, index in self.use.layers if index is not None}
        return guider.cfg != 1 and bool(names) and names != {name for name, conds in guider.original_conds.items() if conds}

    def apply_model(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One forward pass, with attention replaced where maps are mixed or collected."""
        options = options_of(args, kwargs)
        run = options.get(RUN)
        if run is None:  # called outside of a sampling run
            return executor(x, t, *args, **kwargs)
        evaluation = run.evaluation
        last = evaluation.index == run.log.steps - 1 or bool(run.policies)  # where a policy decides, any step may be a branch's last
        collects = self.collect is not None and evaluation.first and last
        if self.mixed is None and not collects:
            return executor(x, t, *args, **kwargs)
        rows, entries = options.get(NARROWED, (None, options["uuids"]))
        keys = [(label, self.keys.get(entry)) for label, entry in zip(options["cond_or_uncond"], entries, strict=True)]
        wanted = [collects and entry in self.own for entry in entries]
        options = self.patch(options, Chunks(self.mixed, self.collect, keys, wanted, rows, evaluation.index), x)
        args, kwargs = with_options(options, args, kwargs)
        with uncompiled():
            return executor(x, t, *args, **kwargs)


@dataclass(frozen=True)
class Chunks:
    """The equal chunks of rows of one forward pass: by whose keys they look up maps in ``use``, and which of them are collected.

    rows: those that are left of every chunk, None for all. step: the solver step that evaluates them.
    """

    use: Maps | None
    collect: Maps | None
    keys: Sequence[Hashable]
    wanted: Sequence[bool]
    rows: Sequence[int] | None
    step: int = 0

    def left(self, options: dict[str, Any]) -> Chunks:
        """The chunks that one call of an attention function has."""
        left = chunks_left(options, len(self.keys))
        return replace(self, keys=[self.keys[i] for i in left], wanted=[self.wanted[i] for i in left])

    def take_in(self, size: tuple[int, int], map_of: Callable[..., Tensor], *tensors: Tensor) -> None:
        """Collect ``map_of`` each wanted chunk of the tensors [B, ...]."""
        for key, wanted, *parts in zip(self.keys, self.wanted, *map(self.split, tensors), strict=True):
            if wanted:
                self.collect.add(key, size, map_of(*parts), self.step, self.rows)

    def maps(self, size: tuple[int, int], tokens: int, like: Tensor) -> list[Tensor | None]:
        """The map [B/chunks, h*w, T] of each chunk, of the dtype and on the device of ``like``."""
        maps = [self.use and self.use.at(key, size, tokens, like) for key in self.keys]
        return maps if self.rows is None else [grid if grid is None else grid[on_device_of(grid, self.rows)] for grid in maps]

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """A tensor [B, ...] by chunks."""
        return tensor.chunk(len(self.keys))


# --- in a UNet -------------------------------------------------------------------------------------------------------


def _in_unet(blocks: Sequence[tuple[str, int, int]], weight: float, options: dict[str, Any], chunks: Chunks, x: Tensor) -> dict[str, Any]:
    """The options of one forward pass with every cross-attention replaced."""
    replaced = {kind: dict(of_kind) for kind, of_kind in options.get("patches_replace", {}).items()}
    attn2 = replaced.setdefault("attn2", {})
    for block in blocks:
        attn2[block] = MixedAttention(chunks, weight, attn2.get(block, attn2.get(block[:2])))
    return options | {"patches_replace": replaced}


@dataclass(frozen=True)
class MixedAttention:
    """attn2 of one layer in one forward pass."""

    chunks: Chunks
    weight: float
    previous: Callable | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """q [B, N, H*d], k and v [B, T, H*d] -> [B, N, H*d]."""
        size, w = tuple(extra_options["activations_shape"][-2:]), self.weight
        if size[0] * size[1] != q.shape[1]:  # not one query per latent pixel
            return ordinary_attention(self.previous, q, k, v, extra_options)
        chunks = self.chunks.left(extra_options)
        chunks.take_in(size, partial(attention_map, heads=extra_options["n_heads"]), q, k)
        maps = chunks.maps(size, v.shape[1], v)
        values = chunks.split(v)
        if w == 1 and all(grid is not None for grid in maps):
            return torch.cat([grid @ v_i for grid, v_i in zip(maps, values, strict=True)])
        out = ordinary_attention(self.previous, q, k, v, extra_options)
        if all(grid is None for grid in maps):
            return out
        mixed = zip(chunks.split(out), maps, values, strict=True)
        return torch.cat([x if m is None else (1 - w) * x + w * (m @ v_i) for x, m, v_i in mixed])


# --- in a transformer whose text and picture share one attention -----------------------------------------------------


def _in_joint(patch: int, weight: float, area: float, options: dict[str, Any], chunks: Chunks, x: Tensor) -> dict[str, Any]:
    """The options of one forward pass on x [B, C, h, w] with maps added in every joint attention."""
    size = tuple(-(-side // patch) for side in x.shape[-2:])
    previous = options.get("optimized_attention_override")
    return options | {"optimized_attention_override": AddedMaps(chunks, weight * area / (size[0] * size[1]), size, previous)}


@dataclass(frozen=True)
class AddedMaps:
    """The attention function of one forward pass of a transformer whose text and picture share one attention, text first.

    weight: w_c / N. size: the picture's tokens, high and wide.
    """

    chunks: Chunks
    weight: float
    size: tuple[int, int]
    previous: Callable | None

    def __call__(self, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The host's call of an attention override: ``func`` is the attention function, the rest are its arguments."""
        call = Call.overridden(self.previous, func, *args, **kwargs)
        out = call.func(*args, **kwargs)
        queries, keys = call.lengths
        text = keys - self.size[0] * self.size[1]
        if queries != keys or text <= 0:  # another attention than the joint one
            return out
        chunks = self.chunks.left(call.options["transformer_options"])
        q, k, v = call.by_head()
        chunks.take_in(self.size, map_by_head, q[:, :, text:], k[:, :, :text])
        maps = chunks.maps(self.size, text, v)
        if all(grid is None for grid in maps):
            return out
        words, picture = out.split([text, keys - text], dim=call.output_tokens)
        added = zip(chunks.split(picture), maps, chunks.split(v[:, :, :text]), strict=True)
        w = self.weight * text
        picture = torch.cat([x if m is None else x + w * call.output(m[:, None] @ v_i) for x, m, v_i in added])
        return torch.cat([words, picture], dim=call.output_tokens)
