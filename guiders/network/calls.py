"""One call of the host's attention function: its tensors, and the chunks of rows that it was given.

A fused batch consists of equal chunks of rows, one chunk for each entry of ``cond_or_uncond``. Whatever changes attention in some chunks
only (a branch's variant, maps) takes their rows out, and puts the results together again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.keys import CHUNKS

# --- chunks of rows --------------------------------------------------------------------------------------------------


def chunks_left(options: dict[str, Any], chunks: int) -> Sequence[int]:
    """Which of the forward pass's chunks a call of the attention function was given."""
    return options.get(CHUNKS, range(chunks))


def flags_left(options: dict[str, Any], flags: Sequence[bool]) -> list[bool]:
    """The flags of the chunks that are left in the batch."""
    return [flags[i] for i in chunks_left(options, len(flags))]


def take(x: Tensor, flags: Sequence[bool]) -> Tensor:
    """The rows of the flagged chunks of x [B, ...], without a copy where they follow each other."""
    index = [i for i, flag in enumerate(flags) if flag]
    adjacent = index[-1] - index[0] == len(index) - 1
    return x.unflatten(0, (len(flags), -1))[slice(index[0], index[-1] + 1) if adjacent else index].flatten(0, 1)


def merge(rest: Tensor, flagged: Tensor, flags: Sequence[bool]) -> Tensor:
    """The whole batch again, from the rows that were not flagged and those that were."""
    size = (len(rest) + len(flagged)) // len(flags)
    parts = {False: iter(rest.split(size)), True: iter(flagged.split(size))}
    return torch.cat([next(parts[flag]) for flag in flags])


def narrowed(options: dict[str, Any], flags: Sequence[bool]) -> dict[str, Any]:
    """The options as they describe the flagged chunks alone, for other packs' patches that tell rows apart."""
    options = options.copy()
    options.setdefault(CHUNKS, range(len(flags)))
    for name in (CHUNKS, "cond_or_uncond", "uuids"):
        if len(options.get(name, ())) == len(flags):
            options[name] = [entry for entry, flag in zip(options[name], flags, strict=True) if flag]
    return options


# --- the call --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of the attention function: q, k, v [B, N, H*d] or, with skip_reshape, [B, H, N, d]; k, v maybe fewer heads."""

    func: Callable
    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    mask: Tensor | None
    precision: Any
    options: dict[str, Any]

    @classmethod
    def of(
        cls, func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, attn_precision: Any = None, **kw: Any
    ) -> Call:
        """The host's signature; a mask [N, N], [B, N, N] or [B, H, N, N] gets all its dimensions."""
        if mask is not None and mask.ndim < 4:
            mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
        return cls(func, q, k, v, heads, mask, attn_precision, kw)

    @classmethod
    def overridden(cls, previous: Callable | None, func: Callable, *args: Any, **kwargs: Any) -> Call:
        """What the host calls an attention override with: ``func`` and its arguments. previous: the override that was there before."""
        return cls.of(func if previous is None else partial(previous, func), *args, **kwargs)

    def __call__(self) -> Tensor:
        """Ordinary attention."""
        return self.func(self.q, self.k, self.v, self.heads, mask=self.mask, attn_precision=self.precision, **self.options)

    @property
    def transformer_options(self) -> dict[str, Any]:
        """The options of the forward pass; none where the network does not hand them on."""
        return self.options.get("transformer_options", {})

    @property
    def tokens(self) -> int:
        """The dimension of the tokens of q, k, v."""
        return 2 if self.options.get("skip_reshape") else 1

    @property
    def output_tokens(self) -> int:
        """The dimension of the tokens of the result."""
        return 2 if self.options.get("skip_output_reshape") else 1

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.q.shape[self.tokens], self.k.shape[self.tokens]

    def rows(self, flags: Sequence[bool]) -> Call:
        """The call for the flagged chunks of the batch alone."""
        q, k, v = (take(x, flags) for x in (self.q, self.k, self.v))
        mask = self.mask if self.mask is None or len(self.mask) == 1 else take(self.mask, flags)
        options = {**self.options, "transformer_options": narrowed(self.transformer_options, flags)}
        return replace(self, q=q, k=k, v=v, mask=mask, options=options)

    def queries(self, part: slice) -> Call:
        """The call for some of the queries alone."""
        mask = self.mask if self.mask is None or self.mask.shape[-2] == 1 else self.mask[..., part, :]
        return replace(self, q=self.q.narrow(self.tokens, part.start, part.stop - part.start), mask=mask)

    def among(self, queries: Tensor, keys: Tensor) -> Call:
        """The call for some queries that see some keys alone: indices of both."""
        mask = self.mask
        if mask is not None:
            mask = (mask if mask.shape[-2] == 1 else mask.index_select(-2, queries)).index_select(-1, keys)
        k, v = (x.index_select(self.tokens, keys) for x in (self.k, self.v))
        return replace(self, q=self.q.index_select(self.tokens, queries), k=k, v=v, mask=mask)

    def by_head(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [B, heads, N, d]; grouped heads of k and v repeated."""
        q, k, v = self.q, self.k, self.v
        if self.tokens == 1:
            width = q.shape[-1] // self.heads
            q, k, v = (x.reshape(*x.shape[:2], -1, width).transpose(1, 2) for x in (q, k, v))
        return q, *(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))

    def output(self, out: Tensor) -> Tensor:
        """[B, heads, N, d] in the layout of the host's result."""
        return out if self.output_tokens == 2 else out.transpose(1, 2).flatten(2)


def ordinary_attention(previous: Callable | None, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """A UNet layer's attention as it is without us: an earlier replacement, or the host's. q [B, N, H*d], k and v [B, T, H*d]."""
    if previous is not None:
        return previous(q, k, v, options)
    from comfy.ldm.modules.attention import optimized_attention  # here, so that the rest needs no host

    heads, precision = options["n_heads"], options["attn_precision"]
    return optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=options)
