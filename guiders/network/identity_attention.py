"""Identity self-attention in chosen layers. Ahn et al., ECCV 2024, arXiv 2403.17377, section 4.1: softmax(QK^T/√d) V -> V.

Where text and image tokens share one attention, only image -> image becomes the identity (``masked``): an image token
attends to itself and to the text, normalised together. ``passthrough`` returns V for every token, so that the two streams
stop mixing.

A layer is reached through the options that travel with one forward pass of the model, or by wrappers around its modules that the
options carry and that are there as long as the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..engine.host import owner_of
from ..engine.keys import AROUND
from ..engine.sharing import Chunks
from .calls import flags_left, merge, narrowed, ordinary_attention, take
from .layers import Layer
from .override import OverriddenAttention, refuse_queries
from .prefix import Sharing

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
        before = _owners(options, "attn1_patch")
        for layer in unet:
            attn1, key = patches.setdefault("attn1", {}), (layer.stack, layer.block)
            attn1[(*key, layer.sub)] = _ReplacedAttention(layer, attn1.get((*key, layer.sub), attn1.get(key)), perturbed, before)
        if len(unet) < len(self.layers):
            self._override(options, patches, perturbed)
        return options

    def sharing(self, network: Any, chunks: Chunks, options: dict[str, Any], control: bool, measured: bool) -> Sharing:
        """Around a forward pass: rows that are equal until the first perturbed layer go through what is before it once."""
        return Sharing(network, chunks, options, control, measured)

    def _override(self, options: dict[str, Any], patches: dict[str, dict], perturbed: Sequence[bool]) -> None:
        """Put identity attention into the options of a transformer."""
        hook, before = self.layers[0].architecture.hook, _owners(options, "attn1_patch")
        previous = None if hook == "call" else options.get("optimized_attention_override")
        override = OverriddenAttention(self.layers, self.joint == "masked", previous, perturbed, before)
        if hook != "call":
            options["optimized_attention_override"] = override
        for name in ("block_index", "img_slice"):  # left over from another forward pass, if there
            options.pop(name, None)
        if hook in ("module", "call"):
            options[AROUND] = (*options.get(AROUND, ()), partial(override.in_network, self.layers))
        if hook != "block":
            return
        for layer in self.layers:
            _wrap_block(patches, layer.stack, layer.block, partial(override.replaced, layer))
        if any(layer.stack == "single" for layer in self.layers):
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
            refuse_queries(self.layer, self.before)
        if all(flags):
            return v
        keep = [not flag for flag in flags]
        clean = ordinary_attention(self.previous, *(take(x, keep) for x in (q, k, v)), narrowed(extra_options, keep))
        return merge(clean, take(v, flags), flags)


def _owners(options: dict[str, Any], kind: str) -> list[str]:
    """Whose functions of this kind are among the patches."""
    return [owner_of(function) for function in options.get("patches", {}).get(kind, ())]


# --- its hook in a transformer: optimized_attention_override ---------------------------------------------------------


def _wrap_block(patches: dict[str, dict], stack: str, block: int, around: Callable) -> None:
    """Put ``around(original, args)`` between a block and the replacement that it may have already."""
    key = (f"{stack}_block", block)
    previous = patches.setdefault("dit", {}).get(key)

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        original = partial(around, extra["original_block"])
        return original(args) if previous is None else previous(args, {**extra, "original_block": original})

    patches["dit"][key] = patch
