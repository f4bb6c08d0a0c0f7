"""Rotary positions that stay exact for streams of years. Knows nothing of models or rings.

Metal has no float64, and p * theta of a large position p has no precision left in float32. But positions are
known on the host, so cosines and sines are computed there, in float64, and rounded once.
"""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moshi_stt.models.mlx_impl.fuse import fused

Angles = tuple[mx.array, mx.array]
"""Cosine and sine, float32 (..., D/2)."""


class RotaryTable:
    """Cosines and sines of p * max_period ** (-2 k / head_dim) for k = 0 .. head_dim / 2 - 1 (contract section 5.3)."""

    def __init__(self, head_dim: int, max_period: float) -> None:
        self._thetas = max_period ** (-2.0 * np.arange(head_dim // 2, dtype=np.float64) / head_dim)

    def __call__(self, positions: NDArray[np.int64]) -> Angles:
        """Cosine and sine of every angle: (...) -> two float32 (..., D/2)."""
        angles = positions[..., None] * self._thetas
        return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


@fused
def _turn(even: mx.array, odd: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    return even * cos - odd * sin, even * sin + odd * cos


def rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn each interleaved pair (x_2k, x_2k+1) by its angle, in float32.

    x (..., D) of any float dtype; cos and sin float32, broadcastable to (..., D/2). Returns (..., D) in x's dtype.
    """
    wide = x.astype(mx.float32)
    turned = mx.stack([*_turn(wide[..., 0::2], wide[..., 1::2], cos, sin)], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
