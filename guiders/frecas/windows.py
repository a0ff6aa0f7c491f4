"""Windows for the self-attention of a stage. Not the authors': attention is what grows with the square of a picture's pixels.

A token of the picture attends to those in its own window and, where text and picture share one attention (SD3), to the whole text.
The text attends to everything: it has few queries, so that there is next to nothing to save, and what it gathers stays whole.

A window is a share of the picture, so that all levels of a network have the same ones. From step to step they shift by half a window:
what was a border is the middle of a window in the next step. They do so around their even places, a quarter to either side, so that
there are as many at any time and the outer ones are never small: tokens that see few others come out different, and their window shows.
(So it did on the demo transformer, and where every other layer was shifted.) Nothing is padded, rolled or masked.

Nothing here changes a module or a model. The attention override lies below all that replaces attention in a layer (perturbed
attention, maps, other packs' nodes) and acts where such a replacement calls the host's attention. A layer whose tokens are not those of
the picture any more (HyperTile, ToMe) is left to what made them so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..engine.compiling import uncompiled
from ..engine.keys import RUN, WINDOWS, options_of, with_options
from ..network.calls import Call, ordinary_attention
from ..network.layers import cross_attention_blocks, joint_patch_size
from .stages import NAME

_OVERRIDE = "optimized_attention_override"
_SHIFT = 0.25  # of a window

# --- the maths -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """The windows of one forward pass, or of a layer. size: the picture's tokens in that layer, high and wide."""

    across: int
    down: int
    shifted: bool
    size: tuple[int, int] | None = None

    def boxes(self) -> list[tuple[slice, slice]]:
        """Each window's rows and columns of tokens."""
        height, width = self.size
        ways = (pairwise(borders(height, self.down, self.shifted)), pairwise(borders(width, self.across, self.shifted)))
        return [(slice(*rows), slice(*columns)) for rows, columns in product(*ways)]

    def attention(self, call: Call) -> Tensor:
        """A self-attention within windows. Its last h*w tokens are the picture's; what comes before them is text."""
        height, width = self.size
        tokens = torch.arange(call.lengths[1], device=call.q.device)
        text, picture = tokens[: -height * width], tokens[-height * width :].view(height, width)
        parts = [(text, call.queries(slice(0, len(text))))] if len(text) else []
        for box in self.boxes():
            own = picture[box].flatten()
            parts.append((own, call.among(own, torch.cat([text, own]))))
        return _joined(parts, len(tokens), call.output_tokens)


def borders(length: int, count: int, shifted: bool) -> list[int]:
    """Where ``count`` windows along ``length`` tokens begin and end: a quarter of a window after their even places, or before them.

    The outer windows are larger or smaller by that quarter. There are fewer where there are too few tokens.
    """
    offset = -_SHIFT if shifted else _SHIFT
    cuts = (math.floor((i + offset) * length / count + 0.5) for i in range(1, count))
    return sorted({0, length, *cuts})


def _joined(parts: Sequence[tuple[Tensor, Call]], tokens: int, dim: int) -> Tensor:
    """The results of calls, each put where its indices say. One is in memory at a time."""
    out = None
    for index, call in parts:
        part = call()
        if out is None:
            out = part.new_empty(*part.shape[:dim], tokens, *part.shape[dim + 1 :])
        out.index_copy_(dim, index, part)
    return out


# --- in the host -----------------------------------------------------------------------------------------------------


def check_network(model: Any) -> None:
    """Raise ValueError for a network whose self-attention is not known here."""
    network = model.get_model_object("diffusion_model")
    if not (cross_attention_blocks(network) or joint_patch_size(network)):
        raise ValueError(f"{NAME}: windows work with UNets of pictures and with SD3, not with {type(network).__name__}; leave them out.")


def with_windows(model: Any, across: int, down: int) -> Any:
    """A clone whose self-attention works in so many windows; the model itself for one window."""
    if (across, down) == (1, 1):
        return model
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    options[_OVERRIDE] = WindowedAttention(options.get(_OVERRIDE))
    wrapper = partial(_apply_model, model.get_model_object("diffusion_model"), across, down)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WINDOWS, wrapper)
    return clone


def _apply_model(network: Any, across: int, down: int, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """One forward pass with the windows of its step."""
    options = options_of(args, kwargs)
    run = options.get(RUN)
    if run is None:  # called outside of a sampling run
        return executor(x, t, *args, **kwargs)
    options = windowed(network, Windows(across, down, run.evaluation.index % 2 == 1), options, x)
    args, kwargs = with_options(options, args, kwargs)
    with uncompiled():
        return executor(x, t, *args, **kwargs)


def windowed(network: Any, windows: Windows, options: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The options of one forward pass on x [B, C, h, w], for an attention override that is a ``WindowedAttention``."""
    patch = joint_patch_size(network)
    if patch:
        return options | {WINDOWS: replace(windows, size=tuple(-(-side // patch) for side in x.shape[-2:]))}
    replaced = {kind: dict(of_kind) for kind, of_kind in options.get("patches_replace", {}).items()}
    attn1 = replaced.setdefault("attn1", {})
    for block in cross_attention_blocks(network):
        attn1[block] = _SelfAttention(windows, attn1.get(block, attn1.get(block[:2])))
    return options | {"patches_replace": replaced}


@dataclass(frozen=True)
class _SelfAttention:
    """attn1 of one layer of a UNet: tells the override below it that this is self-attention, and which windows it has."""

    windows: Windows
    previous: Callable | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        """q, k, v [B, N, H*d] -> [B, N, H*d]."""
        size = tuple(extra_options["activations_shape"][-2:])
        if q.shape[1] == k.shape[1] == size[0] * size[1]:
            extra_options = extra_options | {WINDOWS: replace(self.windows, size=size)}
        return ordinary_attention(self.previous, q, k, v, extra_options)


@dataclass(frozen=True)
class WindowedAttention:
    """The attention function of a stage's model. previous: another pack's, which computes the windows."""

    previous: Callable | None

    def __call__(self, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The host's call of an attention override: ``func`` is the attention function, the rest are its arguments."""
        call = Call.overridden(self.previous, func, *args, **kwargs)
        windows, (queries, keys) = call.transformer_options.get(WINDOWS), call.lengths
        if windows is None or queries != keys:  # another attention than that of the picture to itself
            return call.func(*args, **kwargs)
        return windows.attention(call)
