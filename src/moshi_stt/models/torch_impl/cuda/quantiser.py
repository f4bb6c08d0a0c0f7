"""Mimi's residual quantiser in Triton, one launch a level. Knows nothing of how the latents came about.

The nearest vector is that of the least |e|^2 / 2 - r . e, the lowest index of equals. The programs of a level each search a
slice of its codebook and meet in one atomic minimum a row: distance in the high half, index in the low. The next level reads
it and subtracts that vector on the way. Axes: B row, K codebook, D dim.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,attr-defined,operator"

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
    source, source_stride, residual, previous, books, half_norms, best, rows, level,
    SIZE: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SUBTRACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One slice of one codebook for BR rows. With SUBTRACT, the residual is `source` less the last level's choice."""
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
        e = tl.load(books + (level * SIZE + n)[None, :] * D + (start + k)[:, None])
        if PRECISION == "tf32x3":
            big_x = _tf32(x)
            big_e = _tf32(e)
            first = tl.dot(x - big_x, big_e, first, input_precision="tf32")
            second = tl.dot(big_x, e - big_e, second, input_precision="tf32")
            products = tl.dot(big_x, big_e, products, input_precision="tf32")
        else:
            products = tl.dot(x, e, products, input_precision=PRECISION)
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


def quantise(projected: Tensor, books: Tensor, half_norms: Tensor, codes: Tensor, slots: Tensor, *, precision: str) -> None:
    """Write each row's codes into its slot's row of `codes` (slots, K).

    projected  (B, 2*D) float32: the latent through the semantic projection, then through the acoustic one
    books      (K, size, D) float32: the semantic codebook, then the acoustic levels; half_norms (K, size): |e|^2 / 2
    precision  `ieee` or `tf32x3`: both are float32 in effect; `tf32` is coarser
    """

    def kernel() -> None:
        _launch(projected, books, half_norms, codes, slots, precision)

    def plain() -> None:
        residual = projected[:, books.shape[2] :]
        chosen = [(half_norms[0] - projected[:, : books.shape[2]] @ books[0].T).argmin(1)]
        for book, norms in zip(books[1:], half_norms[1:], strict=True):
            chosen.append((norms - residual @ book.T).argmin(1))
            residual = residual - book[chosen[-1]]
        codes[slots] = torch.stack(chosen, 1).to(codes.dtype)

    attempt("quantiser", kernel, plain)


def choose_tile(rows: int, dim: int, precision: str, limits: Limits) -> tuple[int, int, int, int, int]:
    """Rows, vectors and numbers of them at once, warps, stages.

    Never all numbers at once: of a loop with one turn the compiler makes none, and puts the sums that follow it into the
    products, whose order of summation then is another one than that of the other tiles.
    """
    half = dim // 2
    if precision == "ieee":
        return 16, 32, min(64, half), 4, 3
    if rows <= 64:
        return 16, 32, min(128, half), 4, 2
    br, bn, bk, warps, stages = (64, 64, min(32, half), 4, 3) if rows <= 512 else (64, 128, min(32, half), 8, 3)
    return br, bn, bk, warps, max(2, limits.stages(stages, 4 * (br + bn) * bk, br))


def _launch(projected: Tensor, books: Tensor, half_norms: Tensor, codes: Tensor, slots: Tensor, precision: str) -> None:
    rows = projected.shape[0]
    levels, size, dim = books.shape
    apart = rows + rows % 2  # so that every level's minima begin at a multiple of 16 bytes
    best = torch.full((levels, apart), _NOTHING_YET, dtype=torch.int64, device=projected.device)
    buffers = torch.empty(2, rows, dim, dtype=torch.float32, device=projected.device)
    br, bn, bk, warps, stages = choose_tile(rows, dim, precision, limits_of(projected.device))
    grid = (triton.cdiv(rows, br), size // bn)
    with device_of(projected):
        for level in range(levels):
            source = projected if level == 0 else projected[:, dim:] if level < 3 else buffers[level % 2]
            launch(
                _level, grid,
                source, source.stride(0), buffers[(level + 1) % 2], best[max(level - 1, 0)],
                books, half_norms, best[level], rows, level,
                SIZE=size, D=dim, BR=br, BN=bn, BK=bk, SUBTRACT=level >= 2, PRECISION=precision,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
        block = triton.next_power_of_2(levels)
        launch(_keep_codes, (rows,), best, codes, slots, apart, K=levels, BLOCK=block, num_warps=1)
