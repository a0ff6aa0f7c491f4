"""Identity self-attention in chosen layers. Ahn et al., ECCV 2024, arXiv 2403.17377, section 4.1: softmax(QK^T/√d) V -> V.

Where text and image tokens share one attention, only image -> image becomes the identity (``masked``): an image token
attends to itself and to the text, normalised together. ``passthrough`` returns V for every token, so that the two streams
stop mixing.

Nothing here changes a module: a layer is reached through the options that travel with one forward pass of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..engine.host import owner_of
from .calls import Call, flags_left, merge, narrowed, ordinary_attention, take
from .layers import Layer, listing

# --- the maths -------------------------------------------------------------------------------------------------------


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, text: int, mask: Tensor | None = None, scale: float | None = None, at_once: int = 2**26
) -> Tensor:
    """Image tokens that attend to themselves and to all T = ``text`` text tokens, which come first: p_0 v_i + P V_text.

    q, k, v [B, H, T+N, d], mask [B|1, H|1, T+N|1, T+N] or None -> [B, H, N, d]. The same numbers as full attention with
    logits of -inf between different image tokens, from 1+T logits per image token instead of T+N. ``at_once``: how many logits
    may be in memory together.
    """
    q, k_text, k = q[:, :, text:], k[:, :, :text], k[:, :, text:]
    v_text, v = v[:, :, :text], v[:, :, text:]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    to_text, to_self = _mask_parts(mask, text, k.shape[2])
    out = torch.empty_like(v)
    step = max(1, at_once // (q.shape[0] * q.shape[1] * (1 + text)))
    for i in range(0, q.shape[2], step):
        part = slice(i, i + step)
        q_i = q[:, :, part] * scale
        own = (q_i * k[:, :, part]).sum(-1, keepdim=True, dtype=_wide(q.dtype)) + _rows(to_self, part)
        other = (q_i @ k_text.mT).to(own.dtype) + _rows(to_text, part)
        p = torch.cat([own, other], dim=-1).softmax(-1).to(v.dtype)
        out[:, :, part] = p[..., :1] * v[:, :, part] + p[..., 1:] @ v_text
    return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _mask_parts(mask: Tensor | None, text: int, image: int) -> tuple[Tensor | float, Tensor | float]:
    """The additive mask of image queries: toward the text [.., N|1, T] and toward themselves [.., N|1, 1]."""
    if mask is None:
        return 0.0, 0.0
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    if mask.shape[-2] == 1:
        return mask[..., :text], mask[..., text:].mT
    image_rows = mask[..., text:, :]
    return image_rows[..., :text], image_rows[..., text:].diagonal(dim1=-2, dim2=-1).unsqueeze(-1)


def _rows(mask: Tensor | float, part: slice) -> Tensor | float:
    return mask if isinstance(mask, float) or mask.shape[-2] == 1 else mask[..., part, :]


# --- the variant -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IdentityAttention:
    """Identity attention in ``layers``; ``joint``: "masked" or "passthrough", where text and image share an attention."""

    layers: tuple[Layer, ...]
    joint: str = "masked"

    def patch(self, transformer_options: dict[str, Any], perturbed: Sequence[bool]) -> dict[str, Any]:
        """A copy of the options of one forward pass with identity attention where ``perturbed`` is true.

        The batch is ``len(perturbed)`` equal chunks of rows. Whatever replaces or overrides attention already is kept for
        the other chunks.
        """
        options = transformer_options.copy()
        patches = {kind: dict(of_kind) for kind, of_kind in options.get("patches_replace", {}).items()}
        options["patches_replace"] = patches
        unet = [layer for layer in self.layers if layer.architecture.hook == "attn1"]
        before = [owner_of(function) for function in options.get("patches", {}).get("attn1_patch", ())]
        for layer in unet:
            attn1, key = patches.setdefault("attn1", {}), (layer.stack, layer.block)
            attn1[(*key, layer.sub)] = _ReplacedAttention(layer, attn1.get((*key, layer.sub), attn1.get(key)), perturbed, before)
        if len(unet) < len(self.layers):
            self._override(options, patches, perturbed)
        return options

    def _override(self, options: dict[str, Any], patches: dict[str, dict], perturbed: Sequence[bool]) -> None:
        """Put identity attention into the options of a transformer."""
        override = _OverriddenAttention(self, options.get("optimized_attention_override"), perturbed)
        options["optimized_attention_override"] = override
        for name in ("block_index", "img_slice"):  # left over from another forward pass, if there
            options.pop(name, None)
        by_block = [layer for layer in self.layers if layer.architecture.hook == "block"]
        for layer in by_block:
            _wrap_block(patches, layer.stack, layer.block, override.inside)
        if any(layer.stack == "single" for layer in by_block):
            _wrap_block(patches, "double", 0, override.measured)


# --- its hook in a UNet: patches_replace["attn1"] --------------------------------------------------------------------


class _ReplacedAttention:
    """attn1 of one layer of a UNet: V in the perturbed rows; elsewhere the earlier replacement or the host's attention.

    before: whose functions may change q, k and v before they come here.
    """

    def __init__(self, layer: Layer, previous: Callable | None, perturbed: Sequence[bool], before: Sequence[str]) -> None:
        self.layer, self.previous, self.perturbed, self.before = layer, previous, tuple(perturbed), before
        self.calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """q, k, v [B, N, H*d] -> [B, N, H*d]."""
        flags = flags_left(extra_options, self.perturbed)
        self.calls += 1
        temporal = self.layer.video and self.calls % 2 == 0
        if temporal or not any(flags):
            return ordinary_attention(self.previous, q, k, v, extra_options)
        if q.shape != v.shape:
            self._refuse()
        if all(flags):
            return v
        keep = [not flag for flag in flags]
        clean = ordinary_attention(self.previous, *(take(x, keep) for x in (q, k, v)), narrowed(extra_options, keep))
        return merge(clean, take(v, flags), flags)

    def _refuse(self) -> NoReturn:
        """Raise ValueError where the queries' tokens are not those of the values: V would have no effect, or be of another shape."""
        other = " and ".join(dict.fromkeys(self.before)) or "another node"
        raise ValueError(
            f"PAG (Perturbed-Attention Guidance) and {other} do not go together in the layer {listing((self.layer,))}: its queries were "
            f"divided or merged and its values were not; perturb other layers, or bypass {other}."
        )


# --- its hook in a transformer: optimized_attention_override ---------------------------------------------------------


def _wrap_block(patches: dict[str, dict], stack: str, block: int, around: Callable) -> None:
    """Put ``around(original, args)`` between a block and the replacement that it may have already."""
    key = (f"{stack}_block", block)
    previous = patches.setdefault("dit", {}).get(key)

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        original = partial(around, extra["original_block"])
        return original(args) if previous is None else previous(args, {**extra, "original_block": original})

    patches["dit"][key] = patch


class _OverriddenAttention:
    """The attention function of one forward pass: identity attention while a chosen block runs, else the ordinary one."""

    def __init__(self, rule: IdentityAttention, previous: Callable | None, perturbed: Sequence[bool]) -> None:
        self.masked, self.previous, self.perturbed = rule.joint == "masked", previous, tuple(perturbed)
        self.architecture = rule.layers[0].architecture
        self.chosen = {layer.block for layer in rule.layers}
        self.block: _RunningBlock | None = None
        self.text = 0  # text tokens of this forward pass
        self.unnumbered = 0  # calls of attention outside of numbered blocks
        self.refined = 0  # tokens in the last of these: where text and image are refined before they are joined, the image's

    def measured(self, original: Callable, args: dict[str, Any]) -> dict[str, Any]:
        """Run a block and note the number of text tokens."""
        self.text = args["txt"].shape[1]
        return original(args)

    def inside(self, original: Callable, args: dict[str, Any]) -> dict[str, Any]:
        """Run a chosen block with identity attention."""
        self.block = _RunningBlock()
        if self.architecture.joint and "txt" in args:
            self.text, self.block.image = args["txt"].shape[1], args["img"].shape[1]
        try:
            return original(args)
        finally:
            self.block = None

    def __call__(self, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The host's call of an attention override: ``func`` is the attention function, the rest are its arguments."""
        ordinary = func if self.previous is None else partial(self.previous, func)
        call = Call.of(ordinary, *args, **kwargs)
        flags = flags_left(call.options["transformer_options"], self.perturbed)
        found = self._chosen_self_attention(call)
        if found is None or not any(flags):
            return ordinary(*args, **kwargs)
        if all(flags):
            return self._identity(call, *found)
        keep = [not flag for flag in flags]
        return merge(call.rows(keep)(), self._identity(call.rows(flags), *found), flags)

    def _chosen_self_attention(self, call: Call) -> tuple[int, slice] | None:
        """Of the self-attention of a chosen block: the number of text tokens, and which of the keys the queries are. Else None."""
        options, (queries, keys) = call.options["transformer_options"], call.lengths
        if self.architecture.hook != "block" and not self._in_numbered_block(options, queries, keys):
            return None
        if self.block is None:
            return None
        if not self.architecture.joint:
            own = self.block.own(queries, keys)
            return None if own is None else (0, own)
        if queries != keys:
            return None
        image_only = queries == self.block.image
        return 0 if image_only else options.get("img_slice", (self.text,))[0], slice(None)

    def _in_numbered_block(self, options: dict[str, Any], queries: int, keys: int) -> bool:
        """Without a hook around blocks: whether a chosen one calls, from its number in the options or from the count of calls."""
        index = options.get("block_index")
        if index is None:
            self.refined = queries
            index = self.unnumbered // 2 if self.architecture.hook == "pairs" else None
            self.unnumbered += 1
        if index not in self.chosen:
            return False
        if self.block is None or self.block.index != index:
            self.block = _RunningBlock(index)
        self.text = keys - self.refined
        return True

    def _identity(self, call: Call, text: int, own: slice) -> Tensor:
        """The perturbed rows: V, or, after the text tokens of a joint attention, the masked form."""
        q, k, v = call.by_head()
        if not (self.masked and text):
            return call.output(v[:, :, own])
        image = masked_attention(q, k, v, text, call.mask, call.options.get("scale"))
        return torch.cat([call.text_queries(text)(), call.output(image)], dim=call.output_tokens)


@dataclass
class _RunningBlock:
    """A chosen block while it runs.

    Without joint attention a block begins with its self-attention, in one call or in several that each take the next of the
    queries (LTXV's guide frames); whatever comes after it is cross-attention.
    """

    index: int | None = None
    image: int | None = None
    seen: int = 0
    length: int | None = None

    def own(self, queries: int, keys: int) -> slice | None:
        """Which of the keys the queries of this call are, if it is (a part of) the self-attention."""
        self.length = self.length or keys
        if keys != self.length or self.seen + queries > keys:
            return None
        self.seen += queries
        return slice(self.seen - queries, self.seen)
