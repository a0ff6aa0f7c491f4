"""Colour of pictures in numbers."""

from __future__ import annotations

import numpy as np


def mean_saturation(pixels: np.ndarray) -> float:
    """Mean HSV saturation of pixels [..., 3] from 0 to 255: (max - min) / max of a pixel's channels, 0 for black."""
    channels = np.asarray(pixels, dtype=np.float64)
    high, low = channels.max(axis=-1), channels.min(axis=-1)
    return float(((high - low) / np.maximum(high, 1)).mean())
