"""Mimi's residual quantiser in Triton, one launch a level. Knows nothing of how the latents came about.

The nearest vector is that of the least |e|^2 / 2 - r . e, the lowest index of equals. The programs of a level each search a
slice of its codebook and meet in one atomic minimum a row: distance in the high half, index in the low. The next level reads
it and subtracts that vector on the way. Axes: B row, K codebook, D dim.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,attr-defined,operator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moshi_stt.models.torch_impl.cuda.launch import attempt, device_of, launch
from moshi_stt.models.torch_impl.cuda.limits import Limits, limits_of

_NOTHING_YET = torch.iinfo(torch.int64).max


@triton.jit
def _tf32(x):
    """What the matrix units keep of float32: the first 10 bits of its fraction."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "level"])
def _level(
    source, source_stride, residual, previous, books, big, small, half_norms, best, rows, level,
    SIZE: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SUBTRACT: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One slice of one codebook for BR rows. With SUBTRACT, the residual is `source` less the last level's choice.

    SPLIT: TF32 of the books and what it leaves of them are read from `big` and `small`, straight into shared memory.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    piece = tl.program_id(1)
    n = piece * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    inside = r < rows
    row = r.to(tl.int64)
    chosen = row
    if SUBTRACT:
        chosen = tl.load(previous + row, mask=inside, other=0) & 0x7FFFFFFF
        chosen += (level - 1) * SIZE
    products = tl.zeros([BR, BN], tl.float32)
    first = tl.zeros([BR, BN], tl.float32)  # the products of what TF32 leaves of one side: sums of their own, so that the
    second = tl.zeros([BR, BN], tl.float32)  # order of summation does not depend on BK
    for start in range(0, D, BK):
        x = tl.load(source + row[:, None] * source_stride + (start + k)[None, :], mask=inside[:, None], other=0.0)
        if SUBTRACT:
            x -= tl.load(books + chosen[:, None] * D + (start + k)[None, :], mask=inside[:, None], other=0.0)
            tl.store(residual + row[:, None] * D + (start + k)[None, :], x, mask=inside[:, None] & (piece == 0))
        entry = (level * SIZE + n)[None, :] * D + (start + k)[:, None]
        if PRECISION == "tf32x3":
            if SPLIT:
                big_e = tl.load(big + entry)
                small_e = tl.load(small + entry)
            else:
                e = tl.load(books + entry)
                big_e = _tf32(e)
                small_e = e - big_e
            big_x = _tf32(x)
            first = tl.dot(x - big_x, big_e, first, input_precision="tf32")
            second = tl.dot(big_x, small_e, second, input_precision="tf32")
            products = tl.dot(big_x, big_e, products, input_precision="tf32")
        else:
            products = tl.dot(x, tl.load(books + entry), products, input_precision=PRECISION)
    if PRECISION == "tf32x3":
        products += first + second
    distance = tl.load(half_norms + level * SIZE + n)[None, :] - products
    least, at = tl.min(distance, 1, return_indices=True)
    bits = least.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (order.to(tl.int64) << 32) | (piece * BN + at).to(tl.int64)
    tl.atomic_min(best + row, key, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["apart"])
def _keep_codes(best, codes, slots, apart, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    slot = tl.load(slots + row).to(tl.int64)
    code = tl.load(best + k.to(tl.int64) * apart + row, mask=k < K, other=0) & 0x7FFFFFFF
    tl.store(codes + slot * K + k, code.to(codes.dtype.element_ty), mask=k < K)


class Books(NamedTuple):
    """The codebooks, the semantic one and then the acoustic levels: float32, made by `make_books`.

    vectors     (K, size, D)
    half_norms  (K, size): |e|^2 / 2
    big, small  (K, size, D): what TF32 keeps of the vectors, and the rest, exactly; for steps of many rows
    """

    vectors: Tensor
    half_norms: Tensor
    big: Tensor
    small: Tensor


def make_books(vectors: Tensor) -> Books:
    """From vectors float32 (K, size, D)."""
    big = (vectors.view(torch.int32) & -8192).view(torch.float32)
    return Books(vectors, vectors.square().sum(-1) / 2, big, vectors - big)


class Tile(NamedTuple):
    """Rows, vectors and columns a program has at once; its warps; blocks in flight; whether the books come split."""

    rows: int
    vectors: int
    columns: int
    warps: int
    stages: int
    split: bool


def quantise(
    projected: Tensor, books: Books, codes: Tensor, slots: Tensor, *, precision: str, tile: Tile | None = None
) -> None:
    """Write each row's codes into its slot's row of `codes` (slots, K).

    projected  (B, 2*D) float32: the latent through the semantic projection, then through the acoustic one
    precision  `ieee` or `tf32x3`: both are float32 in effect; `tf32` is coarser
    """

    def kernel() -> None:
        _launch(projected, books, codes, slots, precision, tile)

    def plain() -> None:
        vectors, half_norms = books.vectors, books.half_norms
        residual = projected[:, vectors.shape[2] :]
        chosen = [(half_norms[0] - projected[:, : vectors.shape[2]] @ vectors[0].T).argmin(1)]
        for book, norms in zip(vectors[1:], half_norms[1:], strict=True):
            chosen.append((norms - residual @ book.T).argmin(1))
            residual = residual - book[chosen[-1]]
        codes[slots] = torch.stack(chosen, 1).to(codes.dtype)

    attempt("quantiser", kernel, plain)


def choose_tile(rows: int, dim: int, precision: str, limits: Limits) -> Tile:
    """Never all columns at once: the compiler removes a loop that runs once, and merges the sums after it into the product.

    The order of summation would then not be that of the other tiles.

    Few rows split the books on the way: what they take is reading them, and split they are twice as large.
    """
    half = dim // 2
    if precision == "ieee":
        return Tile(16, 32, min(64, half), 4, 3, split=False)
    if rows <= 64:
        return Tile(16, 32, min(128, half), 4, 2, split=False)
    br, bn, bk, warps, stages = (64, 64, min(32, half), 4, 3) if rows <= 512 else (64, 128, min(32, half), 8, 3)
    stages = max(2, limits.stages(stages, 4 * (br + 2 * bn) * bk, br))
    return Tile(br, bn, bk, warps, stages, split=True)


def _launch(projected: Tensor, books: Books, codes: Tensor, slots: Tensor, precision: str, tile: Tile | None) -> None:
    rows = projected.shape[0]
    levels, size, dim = books.vectors.shape
    apart = rows + rows % 2  # so that every level's minima begin at a multiple of 16 bytes
    best = torch.full((levels, apart), _NOTHING_YET, dtype=torch.int64, device=projected.device)
    buffers = torch.empty(2, rows, dim, dtype=torch.float32, device=projected.device)
    tile = tile or choose_tile(rows, dim, precision, limits_of(projected.device))
    grid = (triton.cdiv(rows, tile.rows), size // tile.vectors)
    with device_of(projected):
        for level in range(levels):
            source = projected if level == 0 else projected[:, dim:] if level < 3 else buffers[level % 2]
            launch(
                _level, grid,
                source, source.stride(0), buffers[(level + 1) % 2], best[max(level - 1, 0)],
                books.vectors, books.big, books.small, books.half_norms, best[level], rows, level,
                SIZE=size, D=dim, BR=tile.rows, BN=tile.vectors, BK=tile.columns,
                SUBTRACT=level >= 2, PRECISION=precision, SPLIT=tile.split,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        block = triton.next_power_of_2(levels)
        launch(_keep_codes, (rows,), best, codes, slots, apart, K=levels, BLOCK=block, num_warps=1)
