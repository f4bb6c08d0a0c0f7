"""Rotary positions that stay exact for streams of months.

The angle p * theta of a large position p has no precision left in float32 (tenths of a radian at p = 10 000 000), and
some devices have no float64. So p is split, p = high * 2**14 + low, and the cosines and sines of both parts, computed on the
host in float64 and rounded once, are joined by the addition theorem: two products and a sum in float32.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SPLIT_BITS = 14
"""Twice as many bits of positions are reached: 248 days of language model steps (12.5 Hz), 124 days of Mimi's (25 Hz)."""


class RotaryTable:
    """Cosines and sines of p * max_period ** (-2 k / head_dim) for k = 0 .. head_dim / 2 - 1 (contract section 5.3)."""

    def __init__(self, head_dim: int, max_period: float, device: torch.device) -> None:
        thetas = max_period ** (-2.0 * np.arange(head_dim // 2, dtype=np.float64) / head_dim)
        steps = np.arange(1 << SPLIT_BITS, dtype=np.float64)
        self._low = _unit_vectors(steps[:, None] * thetas, device)  # (2**14, 2, D/2): cosine, sine
        self._high = _unit_vectors((steps * (1 << SPLIT_BITS))[:, None] * thetas, device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every angle: int64 (...) -> two float32 (..., D/2). Position 0 is exactly (1, 0)."""
        low = self._low[positions & ((1 << SPLIT_BITS) - 1)]  # (..., 2, D/2)
        high = self._high[(positions >> SPLIT_BITS) & ((1 << SPLIT_BITS) - 1)]
        cos_low, sin_low = low.unbind(-2)
        cos_high, sin_high = high.unbind(-2)
        return cos_low * cos_high - sin_low * sin_high, sin_low * cos_high + cos_low * sin_high


def _unit_vectors(angles: NDArray[np.float64], device: torch.device) -> Tensor:
    """float32 (N, 2, D/2) on the device, from float64 angles (N, D/2)."""
    return torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each interleaved pair (x_2k, x_2k+1) by its angle, in float32.

    x (..., D) of any float dtype; cos and sin float32, broadcastable to (..., D/2). Returns (..., D) in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    even, odd = x.to(wide).view(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
