"""Ring attention in Triton: write the new keys and values, and attend, in one pass. Knows nothing of models or graphs.

A ring holds, for each slot and head, the keys and values of the last `context` positions; position p lies at index
p % context. A call advances each row by T positions (1 in the language model, 2 in Mimi): both are written before anything
is attended to, so of a full ring the first of a pair sees context - 1 positions and the second all of them.

Entries that the stream has not written are never read, whatever lies there. A row's result is the same to the last bit
whatever the other rows and their number: the ring's blocks are attended to one by one and joined in their order, by the program
that read them or, where few rows are split over several programs, by `_combine`. The plain twin is
`torch_impl.attention.rotate_and_attend` with `ring_attention`.
Axes: B row, T position, H head, D dim.
"""

# Triton's language has no types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,attr-defined,operator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moshi_stt.models.torch_impl.attention import FP8, Ring, rotate_and_attend
from moshi_stt.models.torch_impl.attention import ring_attention as plain_attention
from moshi_stt.models.torch_impl.cuda.attention_dot import FP8_UP, merge, ring_attention_16, ring_attention_fp8
from moshi_stt.models.torch_impl.cuda.launch import INTERPRETED, attempt, device_of, launch
from moshi_stt.models.torch_impl.cuda.limits import Limits, limits_of


@triton.jit
def _rotated(x, cos, sin, D: tl.constexpr):
    """float32 (D,): the vector at x, its interleaved pairs turned by the angle whose cosines and sines (D/2,) are given."""
    d = tl.arange(0, D)
    straight = tl.load(x + d).to(tl.float32)
    swapped = tl.load(x + (d ^ 1)).to(tl.float32)
    sign = tl.where(d % 2 == 0, -1.0, 1.0)
    return straight * tl.load(cos + d // 2) + sign * swapped * tl.load(sin + d // 2)


@triton.jit
def _block(scores, seen, v):
    """One block by itself: scores (N,) in powers of two, seen (N,) bool, v (N, D)."""
    scores = tl.where(seen, scores, -1e30)
    m = tl.max(scores, 0)
    p = tl.where(seen, tl.exp2(scores - m), 0.0)
    return m, tl.sum(p, 0), tl.sum(p[:, None] * v, 0)


@triton.jit
def _put(part, where, block, m, l, acc, write, D: tl.constexpr, BLOCKS: tl.constexpr):  # noqa: E741
    """Store a block for `_combine`: D sums, the maximum, the weight. Block 0 is the new positions, 1 the ring's first."""
    d = tl.arange(0, D)
    base = part + (where * (BLOCKS + 1) + block) * (D + 2)
    tl.store(base + d, acc, mask=write & (d >= 0))
    tl.store(base + D, m, mask=write)
    tl.store(base + D + 1, l, mask=write)


@triton.jit
def _ring_attention(
    qkv, cos, sin, k_ring, v_ring, k_scales, v_scales, slots, positions, out, part, scale,
    H: tl.constexpr, D: tl.constexpr, CONTEXT: tl.constexpr, T: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program for each head, row and split of the ring. For float32 rings, whose arithmetic stays float32."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    d = tl.arange(0, D)
    ring = (slot * H + head) * CONTEXT
    k_ring += ring * D
    v_ring += ring * D
    BLOCKS: tl.constexpr = (CONTEXT + BLOCK - 1) // BLOCK
    where0 = row * T * H + head
    where1 = where0 + H

    # The new positions: rotated, rounded as the projection's dtype rounds, written by the first split.
    first = split == 0
    half: tl.constexpr = D // 2
    x = qkv + (row * T * 3 * H + head) * D
    angle = row * T * half
    dtype = qkv.dtype.element_ty
    scale = scale * 1.4426950408889634
    w0 = (position % CONTEXT).to(tl.int32)
    q0 = _rotated(x, cos + angle, sin + angle, D).to(dtype).to(tl.float32) * scale
    k0 = _rotated(x + H * D, cos + angle, sin + angle, D).to(dtype).to(tl.float32)
    v0 = tl.load(x + 2 * H * D + d).to(tl.float32)
    tl.store(k_ring + w0 * D + d, k0, mask=first & (d >= 0))
    tl.store(v_ring + w0 * D + d, v0, mask=first & (d >= 0))
    m0 = tl.sum(q0 * k0, 0)
    l0 = m0 * 0.0 + 1.0
    acc0 = v0
    w1 = w0
    if T == 2:
        x += 3 * H * D
        angle += half
        w1 = ((position + 1) % CONTEXT).to(tl.int32)
        q1 = _rotated(x, cos + angle, sin + angle, D).to(dtype).to(tl.float32) * scale
        k1 = _rotated(x + H * D, cos + angle, sin + angle, D).to(dtype).to(tl.float32)
        v1 = tl.load(x + 2 * H * D + d).to(tl.float32)
        tl.store(k_ring + w1 * D + d, k1, mask=first & (d >= 0))
        tl.store(v_ring + w1 * D + d, v1, mask=first & (d >= 0))
        s10 = tl.sum(q1 * k0, 0)
        s11 = tl.sum(q1 * k1, 0)
        top = tl.maximum(s10, s11)
        m1 = top
        l1 = tl.exp2(s10 - top) + tl.exp2(s11 - top)
        acc1 = tl.fma(v1, tl.exp2(s11 - top).broadcast_to(v1.shape), tl.exp2(s10 - top) * v0)
    if SPLITS > 1:
        _put(part, where0, 0, m0, l0, acc0, first, D, BLOCKS)
        if T == 2:
            _put(part, where1, 0, m1, l1, acc1, first, D, BLOCKS)

    # The old positions of this split: those written before, less those that the new ones have just replaced.
    share: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS * BLOCK
    low = split * share
    high = tl.minimum(tl.minimum(position, CONTEXT).to(tl.int32), low + share)
    for start in tl.range(low, high, BLOCK, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK)
        seen = (n < high) & (n != w0) & (n != w1)
        entry = n[:, None] * D + d[None, :]
        k = tl.load(k_ring + entry, mask=seen[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ring + entry, mask=seen[:, None], other=0.0).to(tl.float32)
        m, l, acc = _block(tl.sum(k * q0[None, :], 1), seen, v)  # noqa: E741
        if SPLITS == 1:
            m0, l0, acc0 = merge(m0, l0, acc0, m, l, acc)
        else:
            _put(part, where0, 1 + start // BLOCK, m, l, acc, True, D, BLOCKS)
        if T == 2:
            m, l, acc = _block(tl.sum(k * q1[None, :], 1), seen, v)  # noqa: E741
            if SPLITS == 1:
                m1, l1, acc1 = merge(m1, l1, acc1, m, l, acc)
            else:
                _put(part, where1, 1 + start // BLOCK, m, l, acc, True, D, BLOCKS)

    if SPLITS == 1:
        tl.store(out + where0 * D + d, (acc0 / l0).to(out.dtype.element_ty))
        if T == 2:
            tl.store(out + where1 * D + d, (acc1 / l1).to(out.dtype.element_ty))


@triton.jit
def _combine(
    part, positions, out,
    H: tl.constexpr, D: tl.constexpr, CONTEXT: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Join the blocks of one head of one position, in the order in which a program alone would have. UP: of the sums."""
    where = tl.program_id(0).to(tl.int64)
    BLOCKS: tl.constexpr = (CONTEXT + BLOCK - 1) // BLOCK
    position = tl.load(positions + where // (T * H))
    written = (tl.minimum(position, CONTEXT).to(tl.int32) + BLOCK - 1) // BLOCK
    d = tl.arange(0, D)
    base = part + where * (BLOCKS + 1) * (D + 2)
    m = tl.load(base + D)
    l = tl.load(base + D + 1)  # noqa: E741
    acc = tl.load(base + d)
    for block in tl.static_range(1, BLOCKS + 1):
        there = block <= written
        base += D + 2
        block_m = tl.load(base + D, mask=there, other=-1e30)
        block_l = tl.load(base + D + 1, mask=there, other=0.0)
        block_acc = tl.load(base + d, mask=there & (d >= 0), other=0.0)
        m, l, acc = merge(m, l, acc, block_m, block_l, block_acc)  # noqa: E741
    tl.store(out + where * D + d, (acc / (l * UP)).to(out.dtype.element_ty))


ASSEMBLY = not INTERPRETED and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
"""Whether fp8 pairs are widened by assembly of two results, at which Triton 3.2 (PyTorch 2.6) aborts the process."""


class Tiling(NamedTuple):
    """How a call is cut: splits of the ring, ring entries a block, warps a program, blocks in flight.

    Block and warps decide in what order sums are taken; splits and stages do not.
    """

    splits: int
    block: int
    warps: int
    stages: int


def choose_tiling(rows: int, heads: int, context: int, dim: int, dtype: torch.dtype, limits: Limits) -> Tiling:
    """Few rows are split, so that every multiprocessor has programs; many rows take one pass. Measured on an H200."""
    block, warps = _BLOCKS[dtype]
    programs = rows * heads
    splits = 1
    while programs * splits < 512 and splits < min(16, triton.cdiv(context, block)):
        splits *= 2
    if dtype is torch.float32:
        stages = 1 if splits > 1 else 3
    elif dtype is FP8:
        stages = 2 if splits >= 8 else 3
    else:
        stages = 1 if splits >= 8 else 3
    fitting = limits.stages(stages, 2 * block * dim * dtype.itemsize)
    return Tiling(splits, block, warps, max(fitting, 1))


_BLOCKS = {torch.float32: (32, 2), torch.bfloat16: (64, 4), torch.float16: (32, 1), FP8: (32, 1)}
"""Ring entries and warps by a ring's dtype: whatever the number of rows, since the order of sums depends on them."""


def ring_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, ring: Ring, slots: Tensor, positions: Tensor, *, tiling: Tiling | None = None
) -> Tensor:
    """Write T new positions of each row into its slot's ring, and attend over it.

    qkv       (B, T, 3, H, D) contiguous: the projection before rotation; T is 1 or 2
    cos, sin  (B, T, D/2) float32 of the rows' angles
    slots     (B,) integer, without repeats but for a scratch slot whose contents nobody reads
    positions (B,) integer: the first new position of each row; 0 starts anew, whatever lies in the ring

    Returns (B, T, H, D) in qkv's dtype.
    """
    rows, t, three, heads, dim = qkv.shape
    if three != 3 or t not in (1, 2) or not qkv.is_contiguous():
        raise ValueError(f"ring_attention takes contiguous (B, 1 or 2, 3, H, D), got {tuple(qkv.shape)}")
    context = ring.k.shape[2]
    tiling = tiling or choose_tiling(rows, heads, context, dim, ring.k.dtype, limits_of(qkv.device))
    out = torch.empty(rows, t, heads, dim, dtype=qkv.dtype, device=qkv.device)

    def plain() -> None:
        out.copy_(rotate_and_attend(qkv, (cos, sin), ring, positions, slots, plain_attention).view(out.shape))

    attempt("attention", lambda: _launch(qkv, cos, sin, ring, slots, positions, out, tiling), plain)
    return out


def _launch(
    qkv: Tensor, cos: Tensor, sin: Tensor, ring: Ring, slots: Tensor, positions: Tensor, out: Tensor, tiling: Tiling
) -> None:
    rows, t, _, heads, dim = qkv.shape
    context, splits = ring.k.shape[2], tiling.splits
    blocks = triton.cdiv(context, tiling.block) + 1
    part = torch.empty(rows * t * heads * blocks * (dim + 2), dtype=torch.float32, device=qkv.device) if splits > 1 else cos
    k_scale, v_scale = (ring.k_scale, ring.v_scale) if ring.k_scale is not None else (cos, cos)
    up = 1.0
    with device_of(qkv):
        grid = (heads, rows, splits)
        arguments = (qkv, cos, sin, ring.k, ring.v, k_scale, v_scale, slots, positions, out, part, dim**-0.5)
        constants = {"H": heads, "D": dim, "CONTEXT": context, "T": t, "SPLITS": splits, "BLOCK": tiling.block}
        options = constants | {"STAGES": tiling.stages, "num_warps": tiling.warps}
        if ring.k.dtype is torch.float32:
            launch(_ring_attention, grid, *arguments, **options)
        elif ring.k.dtype is FP8:
            up = FP8_UP
            launch(ring_attention_fp8, grid, *arguments, **options, UP=up, ASSEMBLY=ASSEMBLY)
        else:  # Triton's interpreter cannot multiply bfloat16
            dot = tl.float16 if ring.k.dtype is torch.float16 else tl.float32 if INTERPRETED else tl.bfloat16
            launch(ring_attention_16, grid, *arguments, **options, DOT=dot)
        if splits > 1:
            del constants["SPLITS"]
            warps = 1 if dim <= 64 else 2
            launch(_combine, (rows * t * heads,), part, positions, out, **constants, UP=up, num_warps=warps)
