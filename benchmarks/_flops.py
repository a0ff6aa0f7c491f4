"""Counting floating-point operations: the same number on every machine and in every run."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def counted_flops() -> FlopCounterMode:
    """A context that counts; ``get_total_flops()`` tells. torch itself knows the cost of the GPU's attention kernels alone."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention})


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)
