"""Products with a matrix of weights, in Triton: x Wᵀ, gated or not. No model is known here.

A row's result is the same to the last bit whatever the number of rows: every output is one chain of sums over the columns, in
their order, whatever the tile. Long chains of few output columns are cut into slices (`slices`, which depends on the weight's
shape alone), so that there are programs for every multiprocessor; who reads the parts adds them up in their order.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,attr-defined,operator"

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from moshi_stt.models.torch_impl.cuda.launch import attempt, device_of, launch
from moshi_stt.models.torch_impl.cuda.limits import Limits, limits_of


@triton.jit(do_not_specialize=["count"])
def _product(
    x, weight, out, count, N, K, share,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[s, m, n] = the products of columns s * share .. (s + 1) * share - 1 of x[m] and weight[n], for `count` rows m."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    k = tl.arange(0, BK)
    there = (m < count)[:, None]
    inside = (n < N)[None, :]
    a = x + m[:, None].to(tl.int64) * K + k[None, :] + part * share
    b = weight + n[None, :].to(tl.int64) * K + k[:, None] + part * share
    total = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, share, BK, num_stages=STAGES):
        row = tl.load(a + start, mask=there, other=0.0)
        total = tl.dot(row, tl.load(b + start, mask=inside, other=0.0), total, input_precision=PRECISION)
    at = out + part.to(tl.int64) * count * N + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=there & inside)


@triton.jit(do_not_specialize=["count"])
def _gated(
    x, weight, out, count, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[m, n] = silu(x[m] . weight[n]) * (x[m] . weight[N + n]) for `count` rows m."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k = tl.arange(0, BK)
    there = (m < count)[:, None]
    inside = (n < N)[None, :]
    a = x + m[:, None].to(tl.int64) * K + k[None, :]
    b = weight + n[None, :].to(tl.int64) * K + k[:, None]
    second = N.to(tl.int64) * K
    gate = tl.zeros([BM, BN], tl.float32)
    value = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        row = tl.load(a + start, mask=there, other=0.0)
        gate = tl.dot(row, tl.load(b + start, mask=inside, other=0.0), gate, input_precision=PRECISION)
        value = tl.dot(row, tl.load(b + second + start, mask=inside, other=0.0), value, input_precision=PRECISION)
    y = gate / (1.0 + tl.exp(-gate)) * value
    tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], y.to(out.dtype.element_ty), mask=there & inside)


class Tile(NamedTuple):
    """Rows, weight rows and columns a program has at once; its warps; blocks in flight."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def slices(n: int, k: int) -> int:
    """Into how many slices the columns of a weight (n, k) are cut: more where it is long and has few rows to share out."""
    if n > 4_096 or k < 2_048:
        return 1
    count = 4 if k >= 4_096 else 2
    while k % (16 * count):
        count //= 2
    return count


def choose_tile(count: int, n: int, k: int, itemsize: int, limits: Limits, *, gated: bool = False) -> Tile:
    """Small tiles where there is little work, so that every multiprocessor has some; large ones where there is much.

    k: columns that must be a multiple of the tile's. Chosen on an H200, then cut to what the device allows.
    """
    wide = n > 4_096
    if itemsize == 4:
        tile = Tile(16 if count <= 16 else 32, 32, 32, 4, 2)
    elif count <= 16:
        tile = Tile(16, 32, 128, 4, 6) if k <= 1_024 else Tile(16, 64, 128, 4, 5)
    elif count <= 32:
        tile = Tile(32, 64, 128, 4, 4) if gated else Tile(32, 32, 128, 4, 5)
    elif count <= 64:
        tile = Tile(64, 64, 128, 4, 4) if wide else Tile(64, 32, 128, 4, 4)
    elif count <= 128:
        tile = Tile(128, 64, 64, 4, 4) if gated else Tile(64, 64, 64, 4, 5)
    elif not wide:
        tile = Tile(128, 64, 64, 4, 4) if count <= 512 else Tile(128, 256, 64, 8, 3)
    else:
        tile = Tile(128, 128, 64, 8, 4)
    return fitted(tile, k, itemsize, limits, weights=2 if gated else 1)


def fitted(tile: Tile, k: int, itemsize: int, limits: Limits, weights: int = 1) -> Tile:
    """The tile with fewer stages, then fewer columns and rows, until it divides k and fits into shared memory."""
    while k % tile.k:
        tile = tile._replace(k=tile.k // 2)
    while True:
        stages = limits.stages(tile.stages, (tile.m + weights * tile.n) * tile.k * itemsize, tile.m)
        if stages >= min(3, tile.stages) or tile.k <= 32:
            return tile._replace(stages=max(stages, 2))
        tile = tile._replace(k=tile.k // 2)


def product(x: Tensor, weight: Tensor, *, tile: Tile | None = None) -> Tensor:
    """x (B, K) times weight (N, K): (B, N) of x's dtype, summed in float32."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    attempt("product", lambda: _launch(x, weight, out[None], tile), lambda: _library(x, weight, out))
    return out


def sliced_product(x: Tensor, weight: Tensor, *, tile: Tile | None = None) -> Tensor:
    """As `product`, in parts: float32 (slices, B, N), whose sum it is. Where there is one slice, as `product`."""
    count = slices(*weight.shape)
    if count == 1:
        return product(x, weight, tile=tile)
    parts = x.new_empty(count, x.shape[0], weight.shape[0], dtype=torch.float32)

    def plain() -> None:
        parts.zero_()[0] = torch.matmul(x, weight.T)

    attempt("product", lambda: _launch(x, weight, parts, tile), plain)
    return parts


def _launch(x: Tensor, weight: Tensor, out: Tensor, tile: Tile | None) -> None:
    """out (slices, B, N)."""
    count, rows, n = out.shape
    k = x.shape[1]
    cut = tile or choose_tile(rows, n, k // count, x.element_size(), limits_of(x.device))
    with device_of(x):
        launch(
            _product, (triton.cdiv(n, cut.n), triton.cdiv(rows, cut.m), count), x, weight, out, rows, n, k, k // count,
            BM=cut.m, BN=cut.n, BK=cut.k, STAGES=cut.stages, PRECISION=_precision(x), num_warps=cut.warps,
        )  # fmt: skip


def _library(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.matmul(x, weight.T, out=out)


def gated_product(x: Tensor, weight: Tensor, *, tile: Tile | None = None) -> Tensor:
    """x (B, K) -> (B, N) of x's dtype, silu of the gate times the value; weight (2N, K): the gate's half, then the value's."""
    rows, k = x.shape
    n = weight.shape[0] // 2
    out = x.new_empty(rows, n)

    def kernel() -> None:
        cut = tile or choose_tile(rows, n, k, x.element_size(), limits_of(x.device), gated=True)
        with device_of(x):
            launch(
                _gated, (triton.cdiv(n, cut.n), triton.cdiv(rows, cut.m)), x, weight, out, rows, n, k,
                BM=cut.m, BN=cut.n, BK=cut.k, STAGES=cut.stages, PRECISION=_precision(x), num_warps=cut.warps,
            )  # fmt: skip

    def plain() -> None:
        gate, value = F.linear(x, weight).chunk(2, dim=-1)
        torch.mul(F.silu(gate), value, out=out)

    attempt("gated product", kernel, plain)
    return out


def _precision(x: Tensor) -> str:
    """float32 is multiplied as float32; of other dtypes this says nothing."""
    return "ieee" if x.dtype is torch.float32 else "tf32"
