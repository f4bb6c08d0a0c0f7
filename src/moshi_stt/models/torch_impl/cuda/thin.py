"""Matrix products of at most four rows, in Triton: what reading the weights takes, and no more. Knows nothing of models.

A library's product of few rows has small launches around it (norm, gate, residual) and tiles that are mostly empty. Here each
program multiplies a few weight rows with every input row in float32, and takes what stands around it along: the norm of the
input on the way in, bias, gate, residual and activation on the way out.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,attr-defined,operator"

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moshi_stt.models.torch_impl.cuda.launch import device_of

MOST_ROWS = 4


@triton.jit(do_not_specialize=["count", "T"])
def _thin(
    x, alpha, weight, bias, shortcut, out, count, T, row_in, step_in, row_shortcut, row_out, skip, N, eps,
    K: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SHORTCUT: tl.constexpr,
    ELU_IN: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """out[m, n] = f(x[m]) . weight[n] for `count` <= M rows m; with GATE silu of that times f(x[m]) . weight[N + n]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, M)
    k = tl.arange(0, BK)
    there = m < count
    a = x + (m // T).to(tl.int64) * row_in + (m % T) * step_in
    total = tl.zeros([M, BN, BK], tl.float32)
    gated = tl.zeros([M, BN, BK], tl.float32)
    squares = tl.zeros([M, BK], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        inside = start + k < K
        row = tl.load(a[:, None] + (start + k)[None, :], mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if NORM:
            squares += row * row
            row = row * tl.load(alpha + start + k, mask=inside, other=0.0)[None, :]
        if ELU_IN:
            row = tl.where(row > 0, row, tl.exp(row) - 1.0)
        at = weight + n[:, None] * K + (start + k)[None, :]
        mask = (n < N)[:, None] & inside[None, :]
        total += row[:, None, :] * tl.load(at, mask=mask, other=0.0).to(tl.float32)[None, :, :]
        if GATE:
            gated += row[:, None, :] * tl.load(at + N * K, mask=mask, other=0.0).to(tl.float32)[None, :, :]
    y = tl.sum(total, 2)
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
        y = y * scale
    if GATE:
        y = y / (1.0 + tl.exp(-y)) * tl.sum(gated, 2) * scale
    if BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mask = there[:, None] & (n < N)[None, :]
    if SHORTCUT:
        at = shortcut + (m // T).to(tl.int64)[:, None] * row_shortcut + (m % T)[:, None] * N + n[None, :]
        y += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "elu":
        y = tl.where(y > 0, y, tl.exp(y) - 1.0)
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    at = out + (m // T).to(tl.int64)[:, None] * row_out + skip + (m % T)[:, None] * N + n[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=mask)


class Cut(NamedTuple):
    """Weight rows a program, elements of them at once, warps, blocks in flight."""

    n: int
    k: int
    warps: int
    stages: int


def choose_cut(rows: int, n: int, k: int, itemsize: int) -> Cut:
    """Few weight rows where there are few in all, so that every multiprocessor has programs. Measured on an H200."""
    if itemsize == 4 or n < 6_000:
        return Cut(4, min(512, triton.next_power_of_2(k)), 4, 4 if k > 1_024 else 2)
    return Cut(16, 512, 4, 3) if rows == 1 else Cut(8, 256, 4, 4)


def thin(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gate: bool = False,
    shortcut: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """x (B, K) -> out (B, N), at most MOST_ROWS rows; weight (N, K), or (2N, K) with `gate`. Returns out.

    norm (K,): take the RMS norm of x first. gate: silu of the first half times the second. shortcut (B, N) is added, and may be
    `out` itself.
    """
    rows, n = x.shape[0], out.shape[1]
    strides = (x.stride(0), 0, out.stride(0), 0)
    launch(x, weight, out, rows, 1, *strides, n=n, norm=norm, eps=eps, gate=gate, shortcut=shortcut, cut=cut)
    return out


def launch(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    count: int,
    t: int,
    row_in: int,
    step_in: int,
    row_out: int,
    skip: int,
    *,
    n: int,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gate: bool = False,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    elu_in: bool = False,
    activation: str = "",
    cut: Cut | None = None,
) -> None:
    """The kernel with its strides spelt out; see `conv.conv` for what they mean."""
    k = weight.shape[1]
    rows = triton.next_power_of_2(count)
    cut = cut or choose_cut(rows, n, k, weight.element_size())
    with device_of(x):
        _thin[(triton.cdiv(n, cut.n),)](
            x, x if norm is None else norm, weight, weight if bias is None else bias, x if shortcut is None else shortcut, out,
            count, t, row_in, step_in, 0 if shortcut is None else shortcut.stride(0), row_out, skip, n, eps,
            K=k, M=rows, BN=cut.n, BK=cut.k, STAGES=cut.stages, NORM=norm is not None, GATE=gate, BIAS=bias is not None,
            SHORTCUT=shortcut is not None, ELU_IN=elu_in, ACTIVATION=activation, num_warps=cut.warps,
        )  # fmt: skip
