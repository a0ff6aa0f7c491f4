"""Attention in which an image token sees of the image itself alone, and all of the text: the maths, and no host."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, image: slice, mask: Tensor | None = None, scale: float | None = None, at_once: int = 2**26
) -> Tensor:
    """Image tokens that attend to themselves and to all T text tokens, which come first or last: p_0 v_i + P V_text.

    q [B, H, N, d] of the image alone, k, v [B, H, T+N, d], of which ``image`` are the image's, mask [B|1, H|1, N|1, T+N] or None
    -> [B, H, N, d]. The same numbers as full attention with logits of -inf between different image tokens, from 1+T logits per
    image token instead of T+N. ``at_once``: how many logits may be in memory together.
    """
    words = slice(0, image.start) if image.start else slice(image.stop, None)
    k_text, k = k[:, :, words], k[:, :, image]
    v_text, v = v[:, :, words], v[:, :, image]
    text, scale = k_text.shape[2], q.shape[-1] ** -0.5 if scale is None else scale
    to_text, to_self = _mask_parts(mask, words, image)
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


def _mask_parts(mask: Tensor | None, text: slice, image: slice) -> tuple[Tensor | float, Tensor | float]:
    """The additive mask of image queries: toward the text [.., N|1, T] and toward themselves [.., N|1, 1]."""
    if mask is None:
        return 0.0, 0.0
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    own = mask[..., image]
    own = own.mT if mask.shape[-2] == 1 else own.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return mask[..., text], own


def _rows(mask: Tensor | float, part: slice) -> Tensor | float:
    return mask if isinstance(mask, float) or mask.shape[-2] == 1 else mask[..., part, :]
