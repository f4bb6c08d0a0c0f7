"""Causal convolutions that continue over frames. Knows nothing of slots or models.

Layout: (B, T, C), channels last, so that the samples under a kernel are contiguous and a convolution is one matrix product.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moshi_stt.models.spec import ConvSpec
from moshi_stt.models.torch_impl.linear import Linear, make_linear


class Conv(NamedTuple):
    """product: (..., kernel * C_in) -> (..., C_out), its columns ordered kernel-major."""

    spec: ConvSpec
    product: Linear


def make_conv(spec: ConvSpec, weight: Tensor, bias: Tensor | None, steps: int) -> Conv:
    """From the published layout, weight (C_out, C_in, kernel) and bias (C_out,) or None. steps: output steps of a frame."""
    flat = weight.transpose(1, 2).reshape(spec.channels_out, -1)  # (C_out, kernel * C_in)
    return Conv(spec, make_linear(flat, bias, usual_rows=steps))


def stream_conv(conv: Conv, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve x (B, T, C_in) behind its left context (B, kernel - stride, C_in); T is a multiple of the stride.

    Returns (B, T / stride, C_out) and the context for the next frame.
    """
    spec = conv.spec
    rows, steps, channels = x.shape
    if spec.context == 0:
        return conv.product(x), context
    full = torch.cat([context, x], dim=1)  # (B, context + T, C_in)
    windows = full.as_strided((rows, steps // spec.stride, spec.kernel * channels), (full.stride(0), spec.stride * channels, 1))
    return conv.product(windows), full[:, steps:].clone()  # a copy, so that the frame's memory can be used again
