"""Causal convolutions that continue over frames. Knows nothing of slots or models.

Layout: (B, T, C), channels last, so that the samples under a kernel are contiguous and a convolution is one matrix product.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moshi_stt.models.spec import ConvSpec


class Conv(NamedTuple):
    """weight (kernel * C_in, C_out), its rows ordered kernel-major; bias (C_out,) or None."""

    spec: ConvSpec
    weight: Tensor
    bias: Tensor | None


def make_conv(spec: ConvSpec, weight: Tensor, bias: Tensor | None) -> Conv:
    """From the published layout, weight (C_out, C_in, kernel)."""
    return Conv(spec, weight.permute(2, 1, 0).reshape(-1, spec.channels_out).contiguous(), bias)


def stream_conv(conv: Conv, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve x (B, T, C_in) behind its left context (B, kernel - stride, C_in); T is a multiple of the stride.

    Returns (B, T / stride, C_out) and the context for the next frame.
    """
    spec = conv.spec
    rows, steps, channels = x.shape
    if spec.context == 0:
        return _product(x.reshape(rows * steps, channels), conv).view(rows, steps, -1), context
    full = torch.cat([context, x], dim=1)  # (B, context + T, C_in)
    windows = full.as_strided((rows, steps // spec.stride, spec.kernel * channels), (full.stride(0), spec.stride * channels, 1))
    y = _product(windows.reshape(-1, spec.kernel * channels), conv)
    return y.view(rows, steps // spec.stride, -1), full[:, steps:]


def _product(columns: Tensor, conv: Conv) -> Tensor:
    return torch.addmm(conv.bias, columns, conv.weight) if conv.bias is not None else columns @ conv.weight
