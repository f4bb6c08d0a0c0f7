"""The gated product of up to 64 rows, in Triton: both halves of the weights in one pass, gated on the way out. Knows no models.

Weights are read once, the next blocks already on their way, at two thirds of the memory's speed; a library's product and a
kernel for the gate take a sixth longer (H200, 1B shape). `thin` is the same for a row or two.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,attr-defined,operator"

import triton
import triton.language as tl
from torch import Tensor

from moshi_stt.models.torch_impl.cuda.launch import device_of

MOST_ROWS = 64

_BN, _BK, _WARPS, _STAGES = 64, 128, 4, 4
"""Measured on an H200."""


@triton.jit(do_not_specialize=["count"])
def _gated(
    x, weight, out, count, N, K: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[m, n] = silu(x[m] . weight[n]) * (x[m] . weight[N + n]) for `count` <= M rows m."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, M)
    k = tl.arange(0, BK)
    there = (m < count)[:, None]
    inside = (n < N)[None, :]
    gate = tl.zeros([M, BN], tl.float32)
    value = tl.zeros([M, BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        row = tl.load(x + m[:, None] * K + (start + k)[None, :], mask=there, other=0.0)
        at = weight + n[None, :].to(tl.int64) * K + (start + k)[:, None]
        gate = tl.dot(row, tl.load(at, mask=inside, other=0.0), gate)
        value = tl.dot(row, tl.load(at + N * K, mask=inside, other=0.0), value)
    y = gate / (1.0 + tl.exp(-gate)) * value
    tl.store(out + m[:, None] * N + n[None, :], y.to(out.dtype.element_ty), mask=there & inside)


def fits(x: Tensor) -> bool:
    """Whether `gated_product` takes these rows."""
    return x.shape[0] <= MOST_ROWS and x.element_size() == 2 and x.shape[1] % _BK == 0


def gated_product(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, K) -> (B, N), of x's dtype, summed in float32; weight (2N, K): the gate's half, then the value's. See `fits`."""
    rows, k = x.shape
    n = weight.shape[0] // 2
    out = x.new_empty(rows, n)
    with device_of(x):
        _gated[(triton.cdiv(n, _BN),)](
            x, weight, out, rows, n, K=k, M=max(16, triton.next_power_of_2(rows)), BN=_BN, BK=_BK, STAGES=_STAGES,
            num_warps=_WARPS,
        )  # fmt: skip
    return out
