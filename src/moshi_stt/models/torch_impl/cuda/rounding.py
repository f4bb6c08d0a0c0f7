"""Rounding to what is stored: float16 saturates, so that one large number does not become infinity and then no number."""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,attr-defined,operator"

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOAT16_MOST = torch.finfo(torch.float16).max


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 rounded to dtype; beyond float16's range its largest number."""
    if dtype == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As `rounded`, in PyTorch's operations."""
    return (x.clamp(-FLOAT16_MOST, FLOAT16_MOST) if dtype is torch.float16 else x).to(dtype)
