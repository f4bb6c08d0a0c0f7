"""Causal convolutions that continue over frames. Knows nothing of slots or models.

Layout: (B, T, C), channels last, so that the samples under a kernel are contiguous and a convolution is one matrix product.
"""

from typing import NamedTuple

import mlx.core as mx

from moshi_stt.models.mlx_impl.linear import DenseLinear
from moshi_stt.models.spec import ConvSpec


class Conv(NamedTuple):
    """product: (..., kernel * C_in) -> (..., C_out), its columns ordered kernel-major."""

    spec: ConvSpec
    product: DenseLinear


def make_conv(spec: ConvSpec, weight: mx.array, bias: mx.array | None) -> Conv:
    """From the published layout, weight (C_out, C_in, kernel) and bias (C_out,) or None."""
    flat = weight.swapaxes(1, 2).reshape(spec.channels_out, -1)  # (C_out, kernel * C_in)
    return Conv(spec, DenseLinear(mx.contiguous(flat), bias))


def stream_conv(conv: Conv, x: mx.array, context: mx.array) -> tuple[mx.array, mx.array]:
    """Convolve x (B, T, C_in) behind its left context (B, kernel - stride, C_in); T is a multiple of the stride.

    Returns (B, T / stride, C_out) and the context for the next frame.
    """
    spec = conv.spec
    rows, steps, channels = x.shape
    if spec.context == 0:
        return conv.product(x), context
    full = mx.concatenate([context, x], axis=1)  # (B, context + T, C_in)
    windows = mx.as_strided(
        full,
        (rows, steps // spec.stride, spec.kernel * channels),
        ((spec.context + steps) * channels, spec.stride * channels, 1),
    )
    return conv.product(windows), full[:, steps:]
