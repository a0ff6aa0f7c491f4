"""Cross-attention maps of one stage of a cascade, reused in the next. Zhang, Li, Zhang, ICLR 2025, arXiv 2410.18410, section 3.

    M = mean over heads of softmax(Q K^T / sqrt(d))         collected in the last evaluation of a stage, averaged over the layers
    out = (1 - w_c) softmax(Q K^T / sqrt(d)) V + w_c up(M) V  in every evaluation of the next stage, V being the layer's own

Where text and picture share one attention (SD3), from the authors' code: Q are the picture's, K and V the text's T tokens, and

    out = attention + w_c T/N up(M) V_text                  for the picture's tokens, of which the first stage has N

Maps are enlarged in two dimensions. (The authors' camap_wrapper.py enlarges the flattened queries as one, which scrambles them.)
map_patches.py reaches the layers of the host's models with them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# --- the maths -------------------------------------------------------------------------------------------------------


def attention_map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """mean over heads of softmax(Q K^T / sqrt(d)): q [B, N, H*d], k [B, T, H*d] -> [B, N, T] float32, rows that sum to 1."""
    return map_by_head(*(rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k)))


def map_by_head(q: Tensor, k: Tensor, at_once: int = 2**27) -> Tensor:
    """The same of q [B, H, N, d], k [B, H, T, d]. ``at_once``: how many logits may be in memory together."""
    rows = max(1, at_once // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [(part.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(-1).mean(1) for part in q.split(rows, dim=2)]
    return torch.cat(parts, dim=1)


def enlarged(grid: Tensor, height: int, width: int) -> Tensor:
    """A map [B, T, h, w] at another size, bilinear in two dimensions: sums over T stay 1."""
    if tuple(grid.shape[-2:]) == (height, width):
        return grid
    return F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)


def average(layers: Mapping[tuple[int, int], tuple[Tensor, int]]) -> Tensor:
    """The mean map [B, T, h, w] of layers given as {(h, w): (sum of maps [B, T, h, w], number of maps)}.

    Layers of one size first, then the sizes, all at the largest of them.
    """
    largest = max(layers, key=lambda size: size[0] * size[1])
    return torch.stack([enlarged(total / count, *largest) for total, count in layers.values()]).mean(0)


def with_tokens(grid: Tensor, tokens: int) -> Tensor | None:
    """A map [B, T, h, w] for a text that the host has repeated to another number of tokens; None for another text.

    The host repeats the shorter of two texts that it evaluates together. A repeated token's weight is shared by its copies.
    """
    have = grid.shape[1]
    if tokens % have == 0:
        return grid.repeat(1, tokens // have, 1, 1) / (tokens // have)
    if have % tokens == 0:
        return grid.unflatten(1, (-1, tokens)).sum(1)
    return None


# --- one stage's maps ------------------------------------------------------------------------------------------------


class Maps:
    """The averaged maps of one stage, each under the key of the chunk of rows that it comes from. Lives as long as the cascade's run.

    A policy may stop a branch, or rows of it, before the stage ends. So every row keeps the maps of the last solver step in which it
    was evaluated.

    layers: by key, row and size (h, w), the sum [1, T, h, w] of what was collected, and of how many layers.
    """

    def __init__(self) -> None:
        self.layers: dict[Hashable, dict[int, dict[tuple[int, int], tuple[Tensor, int]]]] = defaultdict(lambda: defaultdict(dict))
        self._steps: dict[tuple[Hashable, int], int] = {}
        self._averages: dict[Hashable, list[Tensor]] = {}
        self._sized: dict[Hashable, Tensor] = {}

    @property
    def empty(self) -> bool:
        """Whether it holds no tensor."""
        return not (self.layers or self._averages or self._sized)

    def add(self, key: Hashable, size: tuple[int, int], grid: Tensor, step: int = 0, rows: Sequence[int] | None = None) -> None:
        """Take in the map [B, N, T] of one layer with h*w = N queries, of these rows (None: all) in one solver step."""
        grids = rearrange(grid, "b (h w) t -> b t h w", h=size[0]).split(1)
        for row, part in zip(range(len(grids)) if rows is None else rows, grids, strict=True):
            if self._steps.setdefault((key, row), step) != step:
                self._steps[key, row] = step
                self.layers[key][row].clear()
            total, count = self.layers[key][row].get(size, (0, 0))
            self.layers[key][row][size] = total + part, count + 1

    def at(self, key: Hashable, size: tuple[int, int], tokens: int, like: Tensor) -> Tensor | None:
        """The averaged map [B, h*w, T] for a layer of the next stage, if there is one for this text."""
        wanted = key, size, tokens
        if wanted not in self._sized:
            if key not in self.layers:
                return None
            if key not in self._averages:
                self._averages[key] = [average(layers) for _, layers in sorted(self.layers[key].items())]
            grids = [with_tokens(grid, tokens) for grid in self._averages[key]]
            if any(grid is None for grid in grids):
                return None
            grids = [enlarged(grid, *size) for grid in grids]
            self._sized[wanted] = rearrange(torch.cat(grids), "b t h w -> b (h w) t").to(like)
        return self._sized[wanted]

    def clear(self) -> None:
        """Free the memory."""
        for part in (self.layers, self._steps, self._averages, self._sized):
            part.clear()
